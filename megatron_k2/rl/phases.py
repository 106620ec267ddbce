"""What a trainer holds while it learns, and what of it while answers are sampled.

Engines on the trainer's own GPUs need its memory during a rollout. Then gradients are freed, since
a step begins with zeros; weights and optimizer state lie in pinned host memory, bit for bit;
communicators give back their buffers (NCCL's suspension, where its version has one). What is left
is CUDA's context, small buffers, and what the allocator cannot give back.

Tensors stay what they are to all who know them: their storages are emptied, and filled again. On a
CPU there is one memory, so that weights and states stay; gradients go and come all the same.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_log = logging.getLogger(__name__)


class Held(NamedTuple):
    """Bytes of a rank's model and optimizer, on the device of its weights."""

    weights: int
    """Parameters and buffers, as the model computes with them."""
    gradients: int
    optimizer: int
    """Its state, and masters that are not the weights themselves."""


def held(stages: Sequence[torch.nn.Module], optimizer: Any) -> Held:
    """What lies there now; a storage that several tensors view is counted once.

    Args:
        stages: this rank's model, as Megatron wraps it.
        optimizer: as Megatron's factory returned it.
    """
    device, seen = _device(stages), set[int]()
    kinds = (_weights(stages), _gradients(stages), _of_optimizer(optimizer))
    return Held(*(sum(s.nbytes() for s in _storages(kind, device, seen)) for kind in kinds))


class Phases:
    """Of one rank's model and optimizer; all methods are collective.

    Args:
        stages: this rank's model, as Megatron wraps it.
        optimizer: as Megatron's factory returned it.
    """

    def __init__(self, stages: Sequence[Any], optimizer: Any) -> None:
        self._stages, self._optimizer = stages, optimizer
        self._moved: list[tuple[torch.UntypedStorage, Tensor]] = []
        self._suspended: list[Any] = []
        self._is_resting = False

    def rest(self, *, keeps_weights: bool) -> None:
        """Before weights are sent and engines answer: nothing is learnt until ``wake``.

        Args:
            keeps_weights: they are still to be read, and ranks to talk; called again without, both
                end.
        """
        is_cuda = _device(self._stages).type == "cuda"
        if not self._is_resting:
            for stage in self._stages:
                stage.offload_grad_buffers(synchronize=is_cuda, empty_cache=False)
        self._is_resting = True
        if is_cuda:
            self._move_out(keeps_weights=keeps_weights)
            torch.cuda.empty_cache()
            if not keeps_weights and not self._suspended:
                dist.barrier()  # engines take the memory of all ranks of a node
                self._suspended = _suspended_communicators()
        _log.info("at rest: %s", held(self._stages, self._optimizer))

    def wake(self) -> None:
        """Before anything is learnt, saved or said to another rank; nothing where none rests."""
        if not self._is_resting:
            return
        for communicator in self._suspended:
            communicator.resume()
        for storage, kept in self._moved:
            storage.resize_(kept.numel())
            _bytes_of(storage).copy_(kept, non_blocking=True)
        if self._moved:
            torch.cuda.synchronize()  # before the host's copies are dropped
        for stage in self._stages:
            stage.restore_grad_buffers(synchronize=False)
        self._suspended, self._moved, self._is_resting = [], [], False

    def _move_out(self, *, keeps_weights: bool) -> None:
        """Optimizer state and weights, storage by storage; those that were moved are empty."""
        seen, device = set[int](), _device(self._stages)
        kinds = (_gradients(self._stages), _weights(self._stages), _of_optimizer(self._optimizer))
        _, weights, state = (list(_storages(kind, device, seen)) for kind in kinds)
        for storage in state if keeps_weights else [*state, *weights]:
            if storage.nbytes():
                kept = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=True)
                kept.copy_(_bytes_of(storage))
                storage.resize_(0)
                self._moved.append((storage, kept))


def _device(stages: Sequence[torch.nn.Module]) -> torch.device:
    return next(stages[0].parameters()).device


def _storages(
    tensors: Iterable[Tensor], device: torch.device, seen: set[int]
) -> Iterator[torch.UntypedStorage]:
    """Each that was not seen before, of those on the device."""
    for tensor in tensors:
        if tensor.device == device:
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                yield storage


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    found = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return found.set_(storage)  # type: ignore[call-overload]  # of a storage, not in the stubs


def _weights(stages: Sequence[Any]) -> Iterator[Tensor]:
    for stage in stages:
        yield from (param.data for param in stage.parameters())
        yield from stage.module.buffers()  # the wrapper's own are Megatron's


def _gradients(stages: Sequence[Any]) -> Iterator[Tensor]:
    for stage in stages:
        yield from (each.grad_data for each in (*stage.buffers, *stage.expert_parallel_buffers))
        yield from (param.grad for param in stage.parameters() if param.grad is not None)


def _of_optimizer(optimizer: Any) -> Iterator[Tensor]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(part, "is_stub_optimizer", False):
            continue
        for group in part.optimizer.param_groups:
            yield from (param.data for param in group["params"])
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value))


def _suspended_communicators() -> list[Any]:
    """Of all groups of this process, those that can be suspended, and now are."""
    found = []
    for group in list(dist.distributed_c10d._world.pg_map):
        backend = group._get_backend(torch.device("cuda"))
        try:
            backend.suspend()  # type: ignore[attr-defined]  # not in the stubs
        except RuntimeError as problem:  # this NCCL has none, or the group never spoke
            _log.info("a communicator keeps its buffers: %s", problem)
            continue
        found.append(backend)
    return found
