"""Activations stored in FP8 and then moved to the host: Megatron's offload behind our hooks.

Megatron's fine-grained offload (``core/pipeline_parallel/fine_grained_activation_offload.py``)
brackets the experts' up-projection and their SwiGLU in saved-tensor hooks of its own, and autograd
asks the innermost hooks only. So while a layer's experts run, its manager is given hooks that store
first and hand the codes and the scales over, a tensor each. Groups, streams, prefetch and limits
stay Megatron's; so does its smallest size (``--min-offloaded-tensor-size``), which keeps the scales
of a small batch on the device.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel.fine_grained_activation_offload import PipelineOffloadManager
from torch import Tensor

from megatron_k2.fp8.pack import ActivationStorage, StoredTensor


@dataclass(frozen=True)
class _HandedOver:
    """A stored tensor as the manager's tags of its codes and its scales."""

    codes: Any
    scales: Any
    dtype: torch.dtype


@contextlib.contextmanager
def storing_before_offload(storage: ActivationStorage) -> Iterator[None]:
    """Megatron's manager stores by ``storage`` what it is given, while entered."""
    manager = PipelineOffloadManager.get_instance()
    theirs = manager._saved_tensors_hooks

    def pack(saved: Tensor) -> Any:
        kept = storage.pack(saved)
        if not isinstance(kept, StoredTensor):
            return manager.on_save_for_backward(saved)
        codes, scales = (manager.on_save_for_backward(part) for part in (kept.codes, kept.scales))
        return _HandedOver(codes, scales, kept.dtype)

    def unpack(kept: Any) -> Tensor:
        if not isinstance(kept, _HandedOver):
            return manager.on_get_saved_tensor(kept)
        codes, scales = (manager.on_get_saved_tensor(tag) for tag in (kept.codes, kept.scales))
        return storage.unpack(StoredTensor(codes, scales, kept.dtype))

    manager._saved_tensors_hooks = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
    try:
        yield
    finally:
        manager._saved_tensors_hooks = theirs
