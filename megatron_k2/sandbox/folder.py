"""A box's folder as seen from outside: every access stays inside, whatever a program left there.

A program may leave symbolic links, pipes, a thousand nested folders, or files without permissions.
Paths are opened part by part without following links, and only regular files are read.
"""

import contextlib
import errno
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path, PurePosixPath

from megatron_k2.errors import UserError

NOBODY = 65534
"""User and group of programs where this process is root: limits do not hold against root."""


def drops_root() -> bool:
    """Whether programs must run as ``NOBODY`` because this process is root."""
    return os.geteuid() == 0


BYTES_AN_ENTRY = 4096
"""What a file or folder counts at least against the limit of disk."""


class Folder:
    """A new folder under the system's temporary one; programs own it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="megatron_k2-box-"))
        if drops_root():
            os.chown(self.path, NOBODY, NOBODY)

    def write(self, name: str, content: bytes) -> None:
        """Put a file there, in place of one of that name."""
        parts = _parts(name)
        folder = self._open_folder(parts[:-1], name, makes=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            file = os.open(parts[-1], flags | os.O_CLOEXEC, 0o644, dir_fd=folder)
        except OSError as problem:
            raise _outside(name, problem) from None
        finally:
            os.close(folder)
        with os.fdopen(file, "wb") as stream:
            if drops_root():
                os.chown(file, NOBODY, NOBODY)
            stream.write(content)

    def read(self, name: str, max_bytes: int) -> bytes:
        """A regular file's first ``max_bytes``."""
        parts = _parts(name)
        folder = self._open_folder(parts[:-1], name, makes=False)
        try:
            # O_NONBLOCK: a pipe that a program left would otherwise hold us for ever.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            file = os.open(parts[-1], flags, dir_fd=folder)
        except OSError as problem:
            raise _outside(name, problem) from None
        finally:
            os.close(folder)
        with os.fdopen(file, "rb") as stream:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise UserError(f"{name!r} in the box is not a regular file")
            return stream.read(max_bytes)

    def _open_folder(self, parts: tuple[str, ...], name: str, *, makes: bool) -> int:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        place = os.open(self.path, flags)
        for part in parts:
            try:
                if makes:
                    _make_folder(part, place)
                inner = os.open(part, flags, dir_fd=place)
            except OSError as problem:
                raise _outside(name, problem) from None
            finally:
                os.close(place)
            place = inner
        return place

    def num_bytes(self, at_most: int) -> int:
        """Bytes on disk of all there; counting ends once over ``at_most``.

        Folders that cannot be counted, since their path is too long or they are closed to us, are
        over it: else they would be where a program keeps what it may not.
        """
        total, todo = 0, [self.path]
        while todo and total <= at_most:
            try:
                with os.scandir(todo.pop()) as entries:
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):
                            todo.append(Path(entry.path))
                        # A million empty files are not free either.
                        blocks = entry.stat(follow_symlinks=False).st_blocks
                        total += max(blocks * 512, BYTES_AN_ENTRY)
            except OSError as problem:
                if problem.errno in (errno.ENAMETOOLONG, errno.EACCES):
                    return at_most + 1
                # else it is gone meanwhile
        return total

    def remove(self) -> None:
        """Take the folder away, whatever is in it."""
        with contextlib.suppress(RecursionError):
            shutil.rmtree(self.path, ignore_errors=True)
        if self.path.exists():  # nested deeper than Python recurses, or without permissions
            subprocess.run(
                ["sh", "-c", 'chmod -R u+rwx "$1"; rm -rf --one-file-system "$1"', "sh", self.path],
                check=False,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )


def _parts(name: str) -> tuple[str, ...]:
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise UserError(f"{name!r}: expected a path inside the box, relative and without '..'")
    return path.parts


def _make_folder(part: str, place: int) -> None:
    try:
        os.mkdir(part, 0o755, dir_fd=place)
        if drops_root():
            os.chown(part, NOBODY, NOBODY, dir_fd=place, follow_symlinks=False)
    except FileExistsError:
        pass


def _outside(name: str, problem: OSError) -> UserError:
    return UserError(f"{name!r} in the box: {problem.strerror}; links are not followed")
