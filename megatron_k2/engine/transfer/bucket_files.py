"""Buckets as safetensors files in one directory: on a tmpfs they are shared memory.

Files are mapped, so that the engine's own copy is the only one on its side; they get their name
when they are whole, and are never written to afterwards.
"""

import uuid
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_k2.checkpoint.hf.writer import TensorSlot, write_header
from megatron_k2.checkpoint.stream.rows import Dtype
from megatron_k2.engine.transfer.incoming import Incoming
from megatron_k2.engine.transfer.manifest import Manifest

_DTYPES = {torch.float32: Dtype.FP32, torch.bfloat16: Dtype.BF16}


class BucketFolder(Incoming):
    """The directory, to be written to as well."""

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
        self.path(name).unlink(missing_ok=True)
