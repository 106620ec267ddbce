"""The checkpoints of a run: where Megatron puts them, which are whole, and which one is meant.

Megatron saves step 500 of ``--save DIR`` in ``DIR/iter_0000500`` and then names it in the tracker
file. An interrupted save leaves a directory without ``metadata.json``, which is written last.
"""

import re
from pathlib import Path

from megatron_k2.errors import UserError
from megatron_k2.files import write_atomically

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron's file that names the last whole checkpoint of a ``--save`` directory."""

RELEASE = "release"
"""Megatron's name for weights without a history: tracker text and directory; it loads them as
iteration 0, without optimizer, scheduler and random state, with or without ``--finetune``."""

METADATA = ".metadata"
"""torch's index of a ``torch_dist`` checkpoint: which tensor has which chunks in which file."""

BACKEND_RECORD = "metadata.json"
"""Megatron's record of a checkpoint's format, written after everything else."""


def iteration_directory(save: Path, iteration: int) -> Path:
    """Where Megatron saves step ``iteration`` of a run in ``save``."""
    return save / f"iter_{iteration:07d}"


def iteration_directories(save: Path) -> dict[int, Path]:
    """Step -> directory of every checkpoint in ``save``, whole or not, in order of steps."""
    matches = [(re.fullmatch(r"iter_(\d+)", path.name), path) for path in save.glob("iter_*")]
    return dict(sorted((int(match[1]), path) for match, path in matches if match and path.is_dir()))


def is_whole(directory: Path) -> bool:
    """Whether the save of the checkpoint in ``directory`` came to its end."""
    return (directory / BACKEND_RECORD).is_file()


def whole_iterations(save: Path) -> list[int]:
    """Steps of the whole checkpoints in ``save``, in order."""
    return [step for step, path in iteration_directories(save).items() if is_whole(path)]


def has_tracker(save: Path) -> bool:
    """Whether Megatron would load a run from ``save``: it looks for the tracker file."""
    return (save / TRACKER).is_file()


def tracker_text(save: Path) -> str | None:
    """What the tracker file of ``save`` says: a step, ``release``, or ``None`` without a file."""
    return (save / TRACKER).read_text().strip() if has_tracker(save) else None


def last_iteration(save: Path) -> int:
    """Step that the run in ``save`` goes on from; 0 without a checkpoint, and for a release."""
    text = tracker_text(save)
    return int(text) if text and text.isdecimal() else 0


def resumable_iteration(save: Path) -> int | None:
    """Step that a run goes on from where it has a checkpoint of its own; ``None`` for a release.

    A tracker file that a kill left empty counts as what ``repair_tracker`` makes of it.
    """
    text = tracker_text(save)
    if text is None or text == RELEASE:
        return None
    if text.isdecimal():
        return int(text) if iteration_directory(save, int(text)).is_dir() else None
    whole = whole_iterations(save)
    return whole[-1] if whole else None


def point_tracker(save: Path, checkpoint: int | str) -> None:
    """Make the next start of a run in ``save`` load ``checkpoint``: a step, or ``RELEASE``."""
    write_atomically(save / TRACKER, str(checkpoint).encode())


def repair_tracker(save: Path) -> None:
    """Mend the tracker file if a kill left it empty.

    Megatron truncates and rewrites it in place, after the checkpoint itself is whole.
    """
    text = tracker_text(save)
    if text is None or re.fullmatch(rf"\d+|{RELEASE}", text):
        return
    if whole := whole_iterations(save):
        point_tracker(save, whole[-1])
    else:
        (save / TRACKER).unlink()


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
    present = list(iteration_directories(checkpoint_dir))
    if iteration is None:
        if tracker_text(checkpoint_dir) == RELEASE:
            return checkpoint_dir / RELEASE
        iteration = _tracked_iteration(checkpoint_dir, present)
    found = iteration_directory(checkpoint_dir, iteration)
    if not found.is_dir():
        have = ", ".join(map(str, present)) or "none"
        raise UserError(f"{checkpoint_dir} has no iteration {iteration}; saved are: {have}")
    return found


def _tracked_iteration(checkpoint_dir: Path, present: list[int]) -> int:
    text = tracker_text(checkpoint_dir)
    if text is None:
        if not present:
            raise UserError(f"{checkpoint_dir} holds no checkpoint: neither {TRACKER} nor iter_*")
        raise UserError(
            f"{checkpoint_dir} has no {TRACKER}, so which checkpoint is complete is not known; "
            f"choose one with --iteration: {', '.join(map(str, present))}"
        )
    if not text.isdigit():
        raise UserError(
            f"{checkpoint_dir / TRACKER} says '{text}', expected an iteration number; use "
            "--iteration"
        )
    return int(text)
