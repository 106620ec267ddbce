"""Buckets as safetensors files in one directory: on a tmpfs they are shared memory.

An engine reads from the directory that it was started with and from nowhere else, whatever a body
names. Files are mapped, so that the engine's own copy is the only one on its side; they get their
name when they are whole, and are never written to afterwards.
"""

import re
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_k2.checkpoint.hf.writer import TensorSlot, write_header
from megatron_k2.checkpoint.stream.rows import Dtype
from megatron_k2.engine.protocol import UpdateCode, UpdateError
from megatron_k2.engine.transfer.manifest import Manifest
from megatron_k2.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DTYPES = {torch.float32: Dtype.FP32, torch.bfloat16: Dtype.BF16}
_MOST_MANIFEST_BYTES = 1 << 28


class BucketFolder:
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

    def write(self, bucket: Sequence[tuple[str, Tensor]]) -> str:
        """Write tensors; the new file's name."""
        ordered = sorted(bucket, key=lambda named: -named[1].itemsize)  # each aligned to its size
        slots = [TensorSlot(name, tuple(t.shape), _DTYPES[t.dtype]) for name, t in ordered]
        name = f"{uuid.uuid4().hex}.safetensors"
        partial = self.directory / f".{name}.partial"
        try:
            with partial.open("wb") as file:
                write_header(file, slots)
                for _, tensor in ordered:
                    flat = tensor.detach().contiguous().cpu().reshape(-1)
                    file.write(flat.view(torch.uint8).numpy())
            partial.rename(self.directory / name)
        finally:
            partial.unlink(missing_ok=True)
        return name

    def write_manifest(self, manifest: Manifest) -> str:
        """Write what a round consisted of; the new file's name."""
        name = f"{uuid.uuid4().hex}.json"
        partial = self.directory / f".{name}.partial"
        partial.write_text(manifest.to_json())
        partial.rename(self.directory / name)
        return name

    def remove(self, name: str) -> None:
        """A file that has been read."""
        self._path(name).unlink(missing_ok=True)

    def require(self, name: str) -> Path:
        """The path of a file that may be read.

        Raises:
            UserError: it has no plain name, or is no file of this directory.
        """
        path = self._path(name)
        if path.is_symlink() or not path.is_file():
            raise UserError(f"{name!r} is no file of the directory that weights may come from")
        return path

    def _path(self, name: str) -> Path:
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
