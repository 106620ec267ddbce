"""What autograd keeps between forward and backward, measured by its own hooks."""

import contextlib
from collections.abc import Callable, Iterator

import torch

from megatron_k2.fp8.pack import ActivationStorage, StoredTensor


@contextlib.contextmanager
def saved_bytes(model: torch.nn.Module | None = None) -> Iterator[Callable[[], int]]:
    """Yields a function that says how many bytes are kept now.

    Each storage counts once and whole, at its size when asked: Megatron's recomputation empties
    storages that were saved. Parameters are left out, and views of ``model``'s; what is stored in
    FP8 counts as it is stored.
    """
    saved: list[torch.Tensor] = []
    weights = {p.untyped_storage()._cdata for p in model.parameters()} if model else set()

    def count(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            saved.append(tensor)
        return tensor

    def total() -> int:
        storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in saved}
        return sum(s.nbytes() for key, s in storages.items() if key not in weights)

    pack = ActivationStorage.pack

    def counted(self: ActivationStorage, tensor: torch.Tensor) -> torch.Tensor | StoredTensor:
        packed = pack(self, tensor)
        is_stored = isinstance(packed, StoredTensor)
        for part in (packed.codes, packed.scales) if is_stored else (packed,):
            count(part)
        return packed

    ActivationStorage.pack = counted
    try:
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            yield total
    finally:
        ActivationStorage.pack = pack
