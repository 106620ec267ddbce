"""What a run writes about itself, and the names of what lies in its directory."""

import re
from pathlib import Path

from megatron_k2.files import write_atomically

RUN_RECORD = "run.json"


TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron's file that names the last whole checkpoint of a ``--save`` directory."""

METADATA = ".metadata"
"""torch's index of a ``torch_dist`` checkpoint."""


def repair_tracker(save: Path) -> None:
    """Mend ``latest_checkpointed_iteration.txt`` if a kill left it empty.

    Megatron truncates and rewrites it in place, after the checkpoint itself is whole. Checkpoints
    whose ``metadata.json`` is there are whole: it is written last.
    """
    tracker = save / TRACKER
    if not tracker.exists() or re.fullmatch(r"\d+|release", tracker.read_text().strip()):
        return
    whole = sorted(path.parent.name for path in save.glob("iter_*/metadata.json"))
    if whole:
        write_atomically(tracker, str(int(whole[-1].removeprefix("iter_"))).encode())
    else:
        tracker.unlink()
