"""Reference logits for ``megatron-k2 convert verify-logits``."""

import os
from pathlib import Path

import numpy as np
import torch

from megatron_k2.engine.mcore.model import InferenceModel


def dump_logits(
    model: InferenceModel, tokens: np.ndarray, path: Path, device: torch.device, *, is_writer: bool
) -> torch.Size:
    """Write ``{"tokens": int64 [n, s], "logits": fp32 [n, s, V]}``, whole or not at all.

    Every rank must call it; the one that ``is_writer`` writes. One sequence at a time goes through
    the model, so only the writer holds all logits.

    Args:
        model: at any layout.
        tokens: [n, s] int64, the same on every rank; ``s`` must divide as the layout needs.
        path: of the file.
        device: of the model.
        is_writer: true on one rank.

    Returns:
        The shape of the logits.
    """
    rows = torch.from_numpy(tokens)
    logits = []
    for row in rows:
        part = model.whole_logits(row[None].to(device))
        if is_writer:
            logits.append(part.cpu())
    if is_writer:
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("wb") as file:
            torch.save({"tokens": rows, "logits": torch.cat(logits)}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    return torch.Size((*rows.shape, model.vocab_size))
