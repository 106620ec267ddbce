"""Reference logits for ``megatron-k2 convert verify-logits``."""

import os
from pathlib import Path

import numpy as np
import torch

from megatron_k2.inference.model import InferenceModel


def dump_logits(
    model: InferenceModel,
    tokens: np.ndarray,
    num_sequences: int,
    seq_length: int,
    path: Path,
    device: torch.device,
    is_writer: bool,
) -> torch.Size:
    """Write ``{"tokens": int64 [n, s], "logits": fp32 [n, s, V]}`` of the first sequences.

    Every rank must call it; the one that ``is_writer`` writes, whole or not at all. One sequence
    at a time goes through the model, so only the writer holds all logits.

    Returns:
        The shape of the logits.
    """
    rows = np.asarray(tokens[: num_sequences * seq_length], dtype=np.int64)
    batch = torch.from_numpy(rows).view(num_sequences, seq_length)
    logits = []
    for row in batch:
        part = model.whole_logits(row[None].to(device))
        if is_writer:
            logits.append(part.cpu())
    if is_writer:
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("wb") as file:
            torch.save({"tokens": batch, "logits": torch.cat(logits)}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    return torch.Size((num_sequences, seq_length, model.vocab_size))
