"""A run as its directory tells it: metrics and, where there is one, run.json."""

from dataclasses import dataclass
from pathlib import Path

from megatron_k2.errors import UserError
from megatron_k2.run.flags import read_flags
from megatron_k2.run.metrics import (
    METRICS_FILE,
    StepRecord,
    read_records,
)
from megatron_k2.run.record import read_run_record


@dataclass(frozen=True)
class Run:
    """What a run directory says of its run."""

    directory: Path
    records: tuple[StepRecord, ...]
    """In order of iterations; at least one."""
    threshold: float | None
    """QK-Clip's τ; ``None`` if unknown."""
    preset: str | None
    data: str | None
    """The data directory it was trained on."""
    is_fine_tuned: bool = False
    """Whether it was fine-tuned on dialogues."""


def read_run(directory: Path, threshold: float | None = None) -> Run:
    """Metrics and, where there is one, ``run.json`` of the run in ``directory``.

    Args:
        directory: what ``--save`` named.
        threshold: τ for a run without ``run.json``; a run that recorded its own keeps it.

    Raises:
        UserError: if there are no metrics.
    """
    path = directory / METRICS_FILE
    records = tuple(read_records(path))
    if not records:
        what = "has no whole line" if path.exists() else "does not exist"
        raise UserError(
            f"{path} {what}; give the directory that 'megatron-k2 pretrain --save' wrote to"
        )
    recorded = read_run_record(directory)
    tau, flags = recorded.get("qk_clip_threshold"), read_flags(recorded.get("flags", []))
    return Run(
        directory=directory,
        records=records,
        threshold=threshold if tau is None else float(tau),
        preset=recorded.get("preset"),
        data=flags.data,
        is_fine_tuned=bool(flags.sft_data),
    )
