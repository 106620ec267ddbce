"""What earlier starts left in a run's directory: torn checkpoints, and a run that is started over.

Both by one rank, before any other reads the directory for more than its tracker file.
"""

import shutil
from pathlib import Path

from megatron_k2.files import sync_directory
from megatron_k2.run.iterations import TRACKER, is_whole, iteration_directories, last_iteration
from megatron_k2.run.metrics import MAX_LOGITS_FILE, METRICS_FILE
from megatron_k2.run.rollback import ROLLBACKS

ASIDE = "started_over"
"""Directory of what ``--start-over`` does not go on from; to be deleted by a person."""


def remove_torn_checkpoints(save: Path) -> list[str]:
    """Delete checkpoints whose save did not come to its end; what was deleted, in words.

    Only those past the tracker's step: what lies before it has been loaded or named once, and may
    be of a format that has no ``metadata.json``.
    """
    last = last_iteration(save)
    removed = []
    for step, path in iteration_directories(save).items():
        if step <= last or is_whole(path):
            continue
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        shutil.rmtree(path)
        removed.append(f"{path}: its save did not come to its end ({size:,} bytes); removed")
    return removed


def set_run_aside(save: Path) -> Path | None:
    """Put the checkpoints and records of the run in ``save`` into a folder; ``None``: it had none.

    The tracker file goes first: a kill between two moves leaves a run that begins anew.
    """
    names = [TRACKER, METRICS_FILE, MAX_LOGITS_FILE, ROLLBACKS]
    found = [save / name for name in names if (save / name).exists()]
    found += iteration_directories(save).values()
    if not found:
        return None
    number = len(list((save / ASIDE).glob("*"))) + 1
    aside = save / ASIDE / str(number)
    aside.mkdir(parents=True)
    for path in found:
        path.rename(aside / path.name)
    sync_directory(save)
    return aside
