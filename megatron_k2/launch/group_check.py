"""Each kind of Megatron's parallel groups does a sum whose result is known, and is timed.

Sums of one size over groups of one kind take the same time where links and GPUs are equal: a group
far above the median has a slow one. Over all ranks at once nobody could tell which.
"""

import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.parallel.layout import Layout

TIMED_ELEMENTS, TIMED_SUMS = 4 * 1024 * 1024, 5
"""fp32 elements of a timed sum, 16 MB, and how many. Ours."""
SLOW = 1.5
"""A group this many times slower than the median of its kind is named. Ours."""


@contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    """End this process, with a sentence, where a collective does not come back."""

    def give_up() -> None:
        where = f"{socket.gethostname()}, rank {os.environ['RANK']}"
        print(f"node check: {where}: {what} took over {seconds:g} s", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def timed_sums(layout: Layout, store: Any, rank: int, seconds: float) -> dict[str, float]:
    """Kind of group -> seconds of a sum over this rank's group, where it has several ranks.

    Args:
        layout: of the training.
        store: where the groups meet.
        rank: this one.
        seconds: any one step may take; then this process ends.

    Raises:
        UserError: for a wrong sum.
    """
    import torch

    from megatron_k2.host.cpu import megatron_host

    with megatron_host() as backend:
        from megatron.core import parallel_state

        if backend == "nccl":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        with within(seconds, "making the process groups"):
            torch.distributed.init_process_group(
                backend, store=store, rank=rank, world_size=int(os.environ["WORLD_SIZE"])
            )
            parallel_state.initialize_model_parallel(**layout.megatron_sizes())
        timed = {}
        for kind, group in _groups().items():
            if group.size() > 1:
                members = torch.distributed.get_process_group_ranks(group)
                with within(seconds, f"a sum over the {kind} group of ranks {members}"):
                    timed[kind] = sum_seconds(group)
        torch.distributed.destroy_process_group()
    return timed


def _groups() -> dict[str, Any]:
    from megatron.core import parallel_state as state

    return {
        "tp": state.get_tensor_model_parallel_group(),
        "pp": state.get_pipeline_model_parallel_group(),
        "cp": state.get_context_parallel_group(),
        "dp": state.get_data_parallel_group(with_context_parallel=True),
        "ep": state.get_expert_model_parallel_group(),
        "expert dp": state.get_expert_data_parallel_group(),
    }


def sum_seconds(group: Any) -> float:
    """Median time of a 16 MB sum over ``group``.

    Raises:
        UserError: for a wrong sum.
    """
    import torch
    import torch.distributed as dist

    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds = []
    for _ in range(TIMED_SUMS):
        ones = torch.ones(TIMED_ELEMENTS, device=device)
        dist.barrier(group)
        start = time.perf_counter()
        dist.all_reduce(ones, group=group)
        smallest, largest = (float(end) for end in ones.aminmax())
        seconds.append(time.perf_counter() - start)
        if not smallest == largest == group.size():
            raise UserError(f"{group.size()} ones were added up to {smallest:g} to {largest:g}")
    return statistics.median(seconds)


def slow_groups(timed: list[tuple[str, dict[str, float]]]) -> str:
    """A line for each kind of group: its median time, and its slowest rank where it stands out.

    Args:
        timed: of every rank, its host and the seconds of its group of each kind.
    """
    lines = []
    for kind in timed[0][1]:
        median = statistics.median(seconds[kind] for _, seconds in timed)
        rank = max(range(len(timed)), key=lambda r: timed[r][1][kind])
        slowest = timed[rank][1][kind]
        line = f"  {kind}: {median * 1e3:.2f} ms a sum of 16 MB, slowest {slowest * 1e3:.2f} ms"
        stands_out = slowest > SLOW * median
        lines.append(line + (f": {timed[rank][0]}, rank {rank}" if stands_out else ""))
    return "\n".join(lines)
