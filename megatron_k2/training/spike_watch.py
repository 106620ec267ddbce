"""Watching a run's loss on all ranks alike, and what is done about a spike (``--on-spike``).

Every rank has the same loss (``step_log`` joins it over the world) and so finds the same spikes.
What depends on the run's directory, rank 0 or the last rank reads and hands out. The window is read
again from ``metrics.jsonl`` after a resume: a resumed run decides as one that never stopped.
"""

import math
from argparse import Namespace
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_k2.host.torchrun import end
from megatron_k2.run.iterations import whole_iterations
from megatron_k2.run.metrics import METRICS_FILE, StepRecord, read_records
from megatron_k2.run.rollback import (
    Rollback,
    plan_rollback,
    read_rollbacks,
    roll_back,
)
from megatron_k2.run.spikes import WINDOW, Spike, find_spike

EXIT_CODE = 3
"""Exit code of a run that a spike stopped."""


class SpikeWatch:
    """The window of losses of a run, the same on every rank.

    Args:
        save: the run's directory, whose metrics the last rank reads; ``None`` starts empty.
        least_nats: see ``find_spike``.
    """

    def __init__(self, save: Path | None, least_nats: float) -> None:
        self._save, self._least_nats = save, least_nats
        self._before: deque[float] | None = None

    def observe(self, record: StepRecord) -> Spike | None:
        """Judge a step, then let it count for those after it; collective at the first."""
        if self._before is None:
            self._before = deque(self._earlier(record.iteration), maxlen=WINDOW)
        if not math.isfinite(record.loss):
            return None  # Megatron's check is for those
        spike = find_spike(record.iteration, record.loss, self._before, self._least_nats)
        self._before.append(record.loss)
        return spike

    def _earlier(self, iteration: int) -> list[float]:
        """Losses before ``iteration`` as the last rank has written them, on every rank."""
        last = dist.get_world_size() - 1
        held = torch.full((WINDOW,), math.nan, dtype=torch.float64, device=_device())
        if self._save is not None and dist.get_rank() == last:
            records = read_records(self._save / METRICS_FILE)
            found = [r.loss for r in records if r.iteration < iteration and math.isfinite(r.loss)]
            if found:
                held[: len(found[-WINDOW:])] = torch.tensor(found[-WINDOW:], dtype=torch.float64)
        dist.broadcast(held, src=last)
        return [loss for loss in held.tolist() if not math.isnan(loss)]


def _device() -> torch.device:
    """Where the backend's collectives take their tensors."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def meet_spike(args: Namespace, spike: Spike, say: Callable[[str], None]) -> None:
    """Do what ``--on-spike`` asks; on every rank, with the same spike.

    Args:
        args: Megatron's and ours.
        spike: just seen; nothing was saved since.
        say: shows a line.

    Raises:
        SystemExit: with 0 after a rollback, so that the run is started again as after any signal;
            with ``EXIT_CODE`` where it stops.
    """
    if args.on_spike == "warn":
        say(f"{spike}; going on (--on-spike warn)")
        return
    why = "--on-spike stop"
    if args.on_spike == "rollback":
        if (rollback := _go_back(args, spike)) is not None:
            say(
                f"{spike}; back to step {rollback.back_to}, and from there without steps "
                f"{rollback.skipped[0]} to {rollback.skipped[-1]}: the same command goes on"
            )
            dist.barrier()
            raise SystemExit(0)
        why = "no checkpoint before it would help: see rollbacks.jsonl"
    say(
        f"{spike}; stopped, nothing was saved since ({why}). The same command meets it again; pass "
        f"it with --iterations-to-skip {spike.iteration}, or --on-spike warn"
    )
    dist.barrier()
    end(EXIT_CODE)


def _go_back(args: Namespace, spike: Spike) -> Rollback | None:
    """Plan and carry out on rank 0, whose view of the directory counts; the plan on every rank."""
    if args.save is None:
        return None
    if args.async_save:
        from megatron.training.async_utils import maybe_finalize_async_save

        maybe_finalize_async_save(blocking=True, terminate=True)
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        save = Path(args.save)
        whole, earlier = whole_iterations(save), read_rollbacks(save)
        found = [plan_rollback(spike, args.spike_margin, whole, earlier)]
        if found[0] is not None:
            roll_back(save, found[0])
    dist.broadcast_object_list(found, src=0)
    plan: Rollback | None = found[0]
    return plan


def take_skips(args: Namespace) -> None:
    """Add the run's skipped steps to Megatron's; rank 0 reads them, so that all have the same."""
    if args.save is None:
        return
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        found = [[step for one in read_rollbacks(Path(args.save)) for step in one.skipped]]
    dist.broadcast_object_list(found, src=0)
    args.iterations_to_skip = sorted({*args.iterations_to_skip, *found[0]})


def skip_batch(data_iterator: Any) -> None:
    """Draw and drop this rank's part of a global batch.

    In place of Megatron's ``dummy_train_step`` (``training/training.py:2288``), which calls
    ``next`` on what may be a list, one iterator a virtual stage, or ``None``, in the middle of a
    pipeline: ``TypeError`` in every layout of the report's kind.
    """
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
    rerun = get_rerun_state_machine()
    while rerun.should_run_forward_backward(data_iterator):
        for iterator in iterators:
            for _ in range(get_num_microbatches() if iterator is not None else 0):
                next(iterator)
