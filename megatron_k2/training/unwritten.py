"""A checkpoint that could not be written, in a sentence: which file, how far, on which disk.

Megatron's writers report ``Worker failure: ... <class 'RuntimeError'>``: the error itself stays in
the writer. What it left on the disk says more.
"""

import resource
import shutil
from pathlib import Path

from megatron_k2.errors import UserError
from megatron_k2.run.iterations import iteration_directory, last_iteration


def unwritten(save: Path, step: int, error: BaseException) -> UserError:
    """What to tell of a save that failed.

    Args:
        save: the run's directory.
        step: that was to be saved.
        error: Megatron's, or the file system's.
    """
    directory = iteration_directory(save, step)
    files = [path for path in directory.rglob("*") if path.is_file()] if directory.is_dir() else []
    stopped = max(files, key=lambda path: path.stat().st_mtime, default=None)
    where, reason = str(directory), _reason(error)
    if stopped is not None:
        size = stopped.stat().st_size
        where = f"{stopped} stopped at {size:,} bytes"
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if limit != resource.RLIM_INFINITY and size >= limit:
            reason = f"a file may have {limit:,} bytes here (ulimit -f)"
    disk = shutil.disk_usage(save)
    last = last_iteration(save)
    kept = f"step {last} is the last that is saved" if last else "no step is saved"
    return UserError(
        f"the checkpoint of step {step} could not be written: {where}{f': {reason}' * bool(reason)}"
        f"; the disk of {save} has {disk.free:,} of {disk.total:,} bytes free. {kept[0].upper()}"
        f"{kept[1:]}; make room and start the same command again"
    )


def _reason(error: BaseException) -> str:
    """The file system's own words, where the error still has them."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        seen = seen.__cause__ or seen.__context__
    return ""
