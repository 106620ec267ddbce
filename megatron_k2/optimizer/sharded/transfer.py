"""One all-to-all under way, and flat tensors cut into parts and put together without copies."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Transfer:
    """One asynchronous all-to-all of flat tensors, with what keeps its buffers alive."""

    received: Tensor
    sizes: list[int]
    work: dist.Work | None
    sent: Tensor = field(repr=False)  # alive until the exchange is done

    def wait(self) -> list[Tensor]:
        """What each rank has sent."""
        if self.work is not None:  # this rank is of the group
            self.work.wait()
        return list(self.received.split(self.sizes))


def start(
    send: Tensor,
    send_sizes: list[int],
    received: Tensor,
    sizes: list[int],
    group: dist.ProcessGroup,
) -> Transfer:
    """Begin to send each rank of ``group`` its run of ``send``.

    Args:
        send: flat, the first rank's run first.
        send_sizes: elements for each rank.
        received: flat, to be filled with each rank's run in turn, the first rank's first.
        sizes: elements from each rank.
        group: the ranks.
    """
    work = dist.all_to_all_single(received, send, sizes, send_sizes, group=group, async_op=True)
    return Transfer(received, sizes, work, send)


def joined(parts: list[Tensor]) -> Tensor:
    """``torch.cat`` of flat parts, without the copy where each follows the last in memory."""
    first = parts[0]
    if len(parts) == 1:
        return first
    storage, end = first.untyped_storage().data_ptr(), first.storage_offset()
    for part in parts:
        if part.untyped_storage().data_ptr() != storage or part.storage_offset() != end:
            return torch.cat(parts)
        end += part.numel()
    return first.as_strided((end - first.storage_offset(),), (1,))


def reader(flat: Tensor) -> Callable[[int], Tensor]:
    """A reader that takes the next ``n`` elements of ``flat`` each time it is called."""
    position = 0

    def take(length: int) -> Tensor:
        nonlocal position
        position += length
        return flat[position - length : position]

    return take
