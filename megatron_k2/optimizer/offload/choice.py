"""Which optimizer states live in host memory, given the part that is to, and how many visit.

A run decides with this (``offload/optimizer.py``, ``host_tensors.py``), and the planner counts with
it (``planning/cost/memory.py``, ``training/dry_run.py``), so a plan's fraction is a run's. No torch
here.
"""

from collections.abc import Sequence

AHEAD = 2
"""Visits under way beside the present one: a bucket's masters while it is orthogonalised, and the
next bucket's momenta."""
WINDOW_BYTES = 256 * 2**20
"""Most bytes of one visit, unless a single tensor has more."""


def chosen_for_host(sizes: Sequence[int], fraction: float) -> list[bool]:
    """Which of the shards go: at least ``fraction`` of every beginning of them, by bytes.

    As Megatron's ``--optimizer-offload-fraction`` means it, whole parameters go until the fraction
    is reached. Megatron takes the first ones; here they are spread over all, so that copies run
    beside the work on shards that stayed.

    Args:
        sizes: bytes of each shard's states, in the order in which a step works on them.
        fraction: 0 to 1.

    Returns:
        One claim a shard. Together they have at least ``fraction`` of all bytes, and less than the
        largest shard more.
    """
    chosen: list[bool] = []
    passed = gone = 0
    for size in sizes:
        passed += size
        chosen.append(gone < fraction * passed)
        gone += size * chosen[-1]
    return chosen
