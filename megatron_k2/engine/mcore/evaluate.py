"""Mean loss over every token of a split, each predicted exactly once.

Windows of ``seq_length + 1`` tokens overlap by one, so all tokens but the split's first are
predicted; the last window is short, padded and masked. A window starts without context, as in
training. Documents are joined, EOD is a token like any other: the n-gram baseline counts alike.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_k2.data.ngram import BASELINE_FILE
from megatron_k2.engine.mcore.model import InferenceModel

MICRO_BATCHES_PER_CALL = 8
"""Enough to fill a pipeline, few enough for a progress bar."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """Loss over all of the split's predicted tokens, the same on every rank."""

    loss_nats: float
    """Mean -ln p per predicted token."""
    num_tokens: int
    seq_length: int

    @property
    def perplexity(self) -> float:
        """E to the power of the mean loss in nats."""
        return math.exp(self.loss_nats)


def num_windows(num_tokens: int, seq_length: int) -> int:
    """Windows that predict ``num_tokens - 1`` tokens."""
    return -(-(num_tokens - 1) // seq_length)


def window_batch(tokens: np.ndarray, indices: range, seq_length: int) -> dict[str, Tensor]:
    """Windows ``indices`` as ``tokens``, ``labels`` [b, s] int64 and ``loss_mask`` [b, s] fp32.

    Positions past the end, and windows past the last, are token 0 with mask 0.
    """
    rows = np.zeros((len(indices), seq_length + 1), dtype=np.int64)
    mask = np.zeros((len(indices), seq_length), dtype=np.float32)
    for row, index in enumerate(indices):
        window = tokens[index * seq_length : (index + 1) * seq_length + 1]
        rows[row, : len(window)] = window
        mask[row, : max(len(window) - 1, 0)] = 1
    whole = torch.from_numpy(rows)
    return {
        "tokens": whole[:, :-1].contiguous(),
        "labels": whole[:, 1:].contiguous(),
        "loss_mask": torch.from_numpy(mask),
    }


def _micro_batches(count: int, micro_batch_size: int) -> Iterator[list[range]]:
    """Window indices of this data-parallel rank, call by call; all ranks get the same number."""
    size = parallel_state.get_data_parallel_world_size()
    rank = parallel_state.get_data_parallel_rank()
    rounds = -(-count // (size * micro_batch_size))
    starts = [(i * size + rank) * micro_batch_size for i in range(rounds)]
    for first in range(0, rounds, MICRO_BATCHES_PER_CALL):
        chunk = starts[first : first + MICRO_BATCHES_PER_CALL]
        yield [range(start, start + micro_batch_size) for start in chunk]


def evaluate(
    model: InferenceModel,
    tokens: np.ndarray,
    *,
    seq_length: int,
    micro_batch_size: int,
    device: torch.device,
    progress: Progress = lambda done, total: None,
) -> Evaluation:
    """Loss of ``model`` on ``tokens``; the same numbers on every rank.

    Args:
        model: at any layout; data-parallel ranks share the windows.
        tokens: [num_tokens] integer ids, two or more, the same on every rank.
        seq_length: tokens a window predicts.
        micro_batch_size: windows at a time on a rank.
        device: of the model.
        progress: told (windows done, windows in all).
    """
    count = num_windows(len(tokens), seq_length)
    # fp64: a sum of 10^9 fp32 losses would otherwise depend on how ranks split it.
    totals = torch.zeros(2, dtype=torch.float64, device=device)

    def collect(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        losses = model.token_losses(logits, batch["labels"]).double()
        mask = batch["loss_mask"].double()
        return torch.stack([(losses * mask).sum(), mask.sum()])

    size = parallel_state.get_data_parallel_world_size()
    done = 0
    for indices in _micro_batches(count, micro_batch_size):
        batches = [
            {k: v.to(device) for k, v in window_batch(tokens, i, seq_length).items()}
            for i in indices
        ]
        for part in model.run(batches, collect):
            totals += part
        done = min(count, done + len(indices) * micro_batch_size * size)
        progress(done, count)
    if parallel_state.get_tensor_model_parallel_rank() > 0:
        totals.zero_()  # TP ranks hold the same sums; the others' are disjoint
    dist.all_reduce(totals)
    loss, num_tokens = totals.tolist()
    return Evaluation(loss / num_tokens, int(num_tokens), seq_length)


def read_bigram_baseline(data_dir: Path) -> float | None:
    """Bigram loss in nats that ``data prepare`` left beside the data, if it did."""
    path = data_dir / BASELINE_FILE
    return float(json.loads(path.read_text())["bigram_nats"]) if path.is_file() else None
