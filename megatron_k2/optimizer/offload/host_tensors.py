"""Tensors that live in host memory and visit the device for their part of each step.

A tensor handed over keeps its identity, shape, device and place in the optimizer's dictionaries;
only its storage is emptied, and filled again for a visit (what FSDP does with parameters). Values
between visits are those of ``values``, and the tensor itself must not be read then.

Visits repeat in the same order step after step, so the order is learnt in the first one: while a
visit lasts, the copies of the next ``AHEAD`` are under way. Copies out run beside both. With CUDA
host memory is pinned and each direction has a stream of its own (``PinnedHostTensors``); on a CPU
device and host are the same memory, copies are immediate, and what is counted is the same.
"""

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from megatron_k2.optimizer.offload.choice import AHEAD, WINDOW_BYTES


class HostTensors:
    """Host copies of tensors, and what they moved.

    Attributes:
        bytes_on_host: of all tensors handed over.
        bytes_on_device: of those, what is on the device or on its way there.
        most_on_device: the largest that ``bytes_on_device`` has been.
        bytes_to_device: copied from the host since the start.
        bytes_to_host: copied from the device since the start.
    """

    def __init__(self, window_bytes: int = WINDOW_BYTES) -> None:
        self._window_bytes = window_bytes
        self._hosts: dict[Tensor, Tensor] = {}
        self._present: set[Tensor] = set()
        self._order: list[list[Tensor]] = []
        self._position: int | None = None
        self.bytes_on_host = self.bytes_on_device = self.most_on_device = 0
        self.bytes_to_device = self.bytes_to_host = 0

    def take(self, tensor: Tensor) -> None:
        """Move ``tensor`` to the host, for good."""
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor.data = tensor.detach().clone()  # a view: its storage is not its own to empty
        self._hosts[tensor] = self._host_memory(tensor)
        self.bytes_on_host += tensor.nbytes
        self._arrived(tensor)
        self.send_back([tensor])

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor in self._hosts

    def values(self, tensor: Tensor) -> Tensor:
        """Where the numbers of ``tensor`` are between visits; itself, if it was not handed over."""
        return self._hosts.get(tensor, tensor)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """One round of visits in the learnt order; nothing stays behind on the device."""
        self._position = 0
        try:
            yield
        finally:
            del self._order[self._position :]
            self._position = None
            self.send_back(list(self._present))

    @contextlib.contextmanager
    def visit(
        self, tensors: Sequence[Tensor], stay: Collection[Tensor] = frozenset()
    ) -> Iterator[None]:
        """``tensors`` on the device while entered; those that live there already are passed over.

        Args:
            tensors: to be worked on, in place.
            stay: left on the device at the end, until ``send_back`` or the end of the step.
        """
        visitors = [tensor for tensor in tensors if tensor in self._hosts]
        self._bring(visitors)
        self._bring_next(visitors)
        self._await(visitors)
        yield
        self.send_back([tensor for tensor in visitors if tensor not in stay])

    def in_windows[T](
        self,
        items: Sequence[T],
        tensors_of: Callable[[T], Sequence[Tensor]],
        stay: Collection[Tensor] = frozenset(),
    ) -> Iterator[list[T]]:
        """``items`` in runs, the tensors of each on the device while it is worked on.

        Args:
            items: in the order of the work.
            tensors_of: each one's tensors.
            stay: see ``visit``.
        """
        windows: list[list[T]] = []
        filled = 0
        for item in items:
            size = sum(tensor.nbytes for tensor in tensors_of(item) if tensor in self._hosts)
            if not windows or filled + size > self._window_bytes:
                windows.append([])
                filled = 0
            windows[-1].append(item)
            filled += size
        for window in windows:
            with self.visit([t for item in window for t in tensors_of(item)], stay):
                yield window

    def send_back(self, tensors: Sequence[Tensor]) -> None:
        """Copy what visited to the host, and empty its storage on the device."""
        for tensor in tensors:
            if tensor not in self._present:
                continue
            self._copy_out(tensor, self._hosts[tensor])
            tensor.untyped_storage().resize_(0)
            self._present.discard(tensor)
            self.bytes_on_device -= tensor.nbytes
            self.bytes_to_host += tensor.nbytes

    def _bring(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            if tensor in self._present:
                continue
            tensor.untyped_storage().resize_(tensor.nbytes)
            self._copy_in(tensor, self._hosts[tensor])
            self._arrived(tensor)
            self.bytes_to_device += tensor.nbytes

    def _bring_next(self, visitors: list[Tensor]) -> None:
        if self._position is None or not visitors:
            return
        learnt = self._order[self._position : self._position + 1]
        if not learnt or not _are_same(learnt[0], visitors):
            del self._order[self._position :]
            self._order.append(visitors)
        self._position += 1
        for following in itertools.islice(self._order, self._position, self._position + AHEAD):
            self._bring(following)

    def _arrived(self, tensor: Tensor) -> None:
        self._present.add(tensor)
        self.bytes_on_device += tensor.nbytes
        self.most_on_device = max(self.most_on_device, self.bytes_on_device)

    def _host_memory(self, tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")

    def _copy_in(self, tensor: Tensor, host: Tensor) -> None:
        tensor.detach().copy_(host)

    def _copy_out(self, tensor: Tensor, host: Tensor) -> None:
        host.copy_(tensor.detach())

    def _await(self, tensors: Sequence[Tensor]) -> None:
        """Work queued from here on finds ``tensors`` filled."""


class PinnedHostTensors(HostTensors):
    """``HostTensors`` over CUDA: pinned host memory, one stream for each direction.

    torch rounds each pinned allocation up to a power of two; K2's expert shards lose 14 % by that.
    """

    def __init__(self, window_bytes: int = WINDOW_BYTES) -> None:
        super().__init__(window_bytes)
        self._inward, self._outward = torch.cuda.Stream(), torch.cuda.Stream()
        self._filled: dict[Tensor, torch.cuda.Event] = {}
        self._saved: dict[Tensor, torch.cuda.Event] = {}

    def _host_memory(self, tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)

    def _copy_in(self, tensor: Tensor, host: Tensor) -> None:
        # The new storage may be memory that queued work still reads.
        self._inward.wait_stream(torch.cuda.current_stream())
        if tensor in self._saved:
            self._inward.wait_event(self._saved.pop(tensor))
        with torch.cuda.stream(self._inward):
            tensor.detach().copy_(host, non_blocking=True)
        self._filled[tensor] = self._inward.record_event()

    def _copy_out(self, tensor: Tensor, host: Tensor) -> None:
        if tensor in self._filled:
            self._outward.wait_event(self._filled.pop(tensor))
        self._outward.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._outward):
            host.copy_(tensor.detach(), non_blocking=True)
        tensor.record_stream(self._outward)  # not to be reused before the copy is done
        self._saved[tensor] = self._outward.record_event()

    def _await(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            if tensor in self._filled:
                torch.cuda.current_stream().wait_event(self._filled.pop(tensor))

    def values(self, tensor: Tensor) -> Tensor:
        """Where the numbers of ``tensor`` are, after the copy to the host is done: waits for it."""
        if tensor in self._saved:
            self._saved[tensor].synchronize()
        return super().values(tensor)


def host_tensors_for(device: torch.device, window_bytes: int = WINDOW_BYTES) -> HostTensors:
    """The form that ``device`` needs."""
    return (PinnedHostTensors if device.type == "cuda" else HostTensors)(window_bytes)


def _are_same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))
