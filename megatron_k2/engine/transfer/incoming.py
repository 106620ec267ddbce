"""The reading side of buckets as files: an engine's directory, and what lies there.

An engine reads from the directory that it was started with and from nowhere else, whatever a body
names. This module and what it imports are read by vLLM's processes too, whose Python may be 3.11.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_k2.engine.protocol import UpdateCode, UpdateError
from megatron_k2.engine.transfer.manifest import Manifest
from megatron_k2.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MOST_MANIFEST_BYTES = 1 << 28


class Incoming:
    """The directory.

    Args:
        directory: exists.

    Raises:
        UserError: it does not.
    """

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise UserError(f"{directory} is no directory; make it, on a tmpfs for shared memory")
        self.directory = directory.resolve()

    def require(self, name: str) -> Path:
        """The path of a file that may be read.

        Raises:
            UserError: it has no plain name, or is no file of this directory.
        """
        path = self.path(name)
        if path.is_symlink() or not path.is_file():
            raise UserError(f"{name!r} is no file of the directory that weights may come from")
        return path

    def path(self, name: str) -> Path:
        """Where a file of this name lies, or would.

        Raises:
            UserError: it has no plain name.
        """
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{name[:80]!r}: expected a file's name, letters, digits, '.', '_' and '-' alone"
            )
        return self.directory / name

    def read(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """A bucket's tensors, views of the mapped file.

        Raises:
            UpdateError: it is no safetensors file, or has gone.
        """
        try:
            with safe_open(self.require(name), "pt") as file:
                for key in file.keys():  # no mapping
                    yield key, file.get_tensor(key)
        except (SafetensorError, OSError, UserError) as error:
            raise UpdateError(UpdateCode.DELIVERY, f"bucket {name}: {error}") from None

    def read_manifest(self, name: str) -> Manifest:
        """What a round consisted of.

        Raises:
            UserError: it is no file of this directory, or far too long.
            UpdateError: it is no manifest.
        """
        path = self.require(name)
        if path.stat().st_size > _MOST_MANIFEST_BYTES:
            raise UserError(f"{name}: longer than {_MOST_MANIFEST_BYTES:,} bytes")
        return Manifest.from_json(path.read_bytes())
