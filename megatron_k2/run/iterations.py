"""Which of a run's checkpoints is meant: Megatron's ``--save`` directory and its tracker file."""

from pathlib import Path

from megatron_k2.errors import UserError
from megatron_k2.run.record import METADATA, TRACKER

RELEASE = "release"
"""Megatron's name for weights without a history: tracker text and directory; it loads them as
iteration 0, without optimizer, scheduler and random state, with or without ``--finetune``."""


def find_iteration(checkpoint_dir: Path, iteration: int | None = None) -> Path:
    """The ``iter_*`` directory of a run's checkpoint directory.

    Args:
        checkpoint_dir: what was given to ``--save``, or one of its ``iter_*`` directories.
        iteration: which; default: the one the tracker file names.

    Raises:
        UserError: if there is none; the message lists what is there.
    """
    if not checkpoint_dir.is_dir():
        raise UserError(
            f"{checkpoint_dir}: no such directory; expected Megatron's --save directory"
        )
    if (checkpoint_dir / METADATA).exists():
        return checkpoint_dir
    present = sorted(int(p.name[5:]) for p in checkpoint_dir.glob("iter_[0-9]*") if p.is_dir())
    if iteration is None:
        if _is_release(checkpoint_dir):
            return checkpoint_dir / RELEASE
        iteration = _tracked_iteration(checkpoint_dir, present)
    found = checkpoint_dir / f"iter_{iteration:07d}"
    if not found.is_dir():
        have = ", ".join(map(str, present)) or "none"
        raise UserError(f"{checkpoint_dir} has no iteration {iteration}; saved are: {have}")
    return found


def _is_release(checkpoint_dir: Path) -> bool:
    """Whether the tracker names weights without a training history, as an import writes them."""
    tracker = checkpoint_dir / TRACKER
    return tracker.exists() and tracker.read_text().strip() == RELEASE


def _tracked_iteration(checkpoint_dir: Path, present: list[int]) -> int:
    tracker = checkpoint_dir / TRACKER
    if not tracker.exists():
        if not present:
            raise UserError(f"{checkpoint_dir} holds no checkpoint: neither {TRACKER} nor iter_*")
        raise UserError(
            f"{checkpoint_dir} has no {TRACKER}, so which checkpoint is complete is not known; "
            f"choose one with --iteration: {', '.join(map(str, present))}"
        )
    text = tracker.read_text().strip()
    if not text.isdigit():
        raise UserError(f"{tracker} says '{text}', expected an iteration number; use --iteration")
    return int(text)
