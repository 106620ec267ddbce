"""Back to the checkpoint before a spike, and past the batches around it.

What happens, in this order, so that a kill between any two of them costs a repetition and nothing
else: the tracker names the earlier checkpoint; later ones are moved to ``rolled_back/``; a line in
``rollbacks.jsonl`` says which steps are left out from now on. Then every rank ends well, as after a
SIGTERM. The same command goes on from there and skips those steps as ``--iterations-to-skip`` does:
their batches are drawn and dropped, no weight moves, the learning rate's schedule does not advance,
and nothing is saved at them.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_k2.errors import UserError
from megatron_k2.files import sync_directory
from megatron_k2.run.iterations import iteration_directories, point_tracker
from megatron_k2.run.spikes import Spike

ROLLBACKS = "rollbacks.jsonl"
MARGIN = 10
"""Default of the steps on either side of a spike that a rollback leaves out too; a choice."""
ASIDE = "rolled_back"
"""Directory of the checkpoints that hold a spike; to be deleted by a person."""


@dataclass(frozen=True)
class Rollback:
    """One return to an earlier checkpoint: a line of ``rollbacks.jsonl``."""

    spike: int
    """Step of the spike."""
    back_to: int
    """Step of the checkpoint that the run goes on from."""
    skipped: tuple[int, ...]
    """Steps whose batches are left out."""
    loss: float
    median: float
    schema_version: int = 1


def plan_rollback(
    spike: Spike, margin: int, whole: Sequence[int], earlier: Sequence[Rollback]
) -> Rollback | None:
    """How a spike is passed; ``None`` where going back would not help.

    The step before a spike may have caused it, and momentum holds what came with it, so ``margin``
    steps on either side are left out too, and the checkpoint is from before all of them.

    Args:
        spike: what was seen.
        margin: steps.
        whole: steps of the checkpoints that can be loaded.
        earlier: rollbacks of this run. One that went back as far, or less far and yet met a spike
            again, shows that the batches were not the cause.
    """
    before = [step for step in whole if step < spike.iteration - margin]
    if not before or any(max(before) <= other.back_to for other in earlier):
        return None
    steps = range(spike.iteration - margin, spike.iteration + margin + 1)
    return Rollback(spike.iteration, max(before), tuple(steps), spike.loss, spike.median)


def read_rollbacks(save: Path) -> list[Rollback]:
    """Every rollback of the run in ``save``, oldest first.

    Raises:
        UserError: if a line is damaged.
    """
    path = save / ROLLBACKS
    if not path.is_file():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [Rollback(**{**line, "skipped": tuple(line["skipped"])}) for line in lines]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is not what a run wrote ({error}); restore it, or remove it and name the "
            "steps with --iterations-to-skip"
        ) from None


def roll_back(save: Path, rollback: Rollback) -> None:
    """Make the next start of the run in ``save`` begin at ``rollback.back_to``; on one rank."""
    point_tracker(save, rollback.back_to)
    (save / ASIDE).mkdir(exist_ok=True)
    for step, path in iteration_directories(save).items():
        if step > rollback.back_to:
            number = len(list((save / ASIDE).glob(f"{path.name}*")))
            path.rename(save / ASIDE / (path.name + (f".{number}" if number else "")))
    sync_directory(save)
    with (save / ROLLBACKS).open("a") as lines:
        lines.write(json.dumps(asdict(rollback)) + "\n")
        lines.flush()
        os.fsync(lines.fileno())
