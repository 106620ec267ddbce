"""Flat shards to whole matrices at their homes, and back: two all-to-alls a bucket.

None where every matrix of the bucket lies whole at home already (``expert_layout``).

Outward, every rank sends each home the pieces of its matrices; the home puts them together,
orthogonalises matrices of one shape in one batch, and sends each rank its part of the result. While
one bucket is orthogonalised, the next one's pieces and the last one's results are under way.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_k2.optimizer.muon import idle_factor
from megatron_k2.optimizer.newton_schulz import batch_size
from megatron_k2.optimizer.plan import (
    Domain,
    Placement,
    Plan,
    held,
    holders,
    lies_whole_on,
    sends,
)

Orthogonalize = Callable[[Tensor, Tensor], Tensor]
Directions = Callable[[list[int]], dict[int, Tensor]]
Apply = Callable[[dict[int, Tensor]], None]


@dataclass
class _Transfer:
    """One all-to-all under way."""

    received: Tensor
    sizes: list[int]
    work: dist.Work | None
    sent: Tensor = field(repr=False)  # alive until the exchange is done

    def wait(self) -> list[Tensor]:
        if self.work is not None:
            self.work.wait()
        return list(self.received.split(self.sizes))


class MatrixExchange:
    """The planned exchange of one domain.

    Args:
        placements: all Muon matrices of the domain, the same on each of its ranks.
        plan: their homes.
        domain: shape of the domain.
        group: its process group; group rank r is domain rank r.
        dtype: of what is sent and orthogonalised.
        device: where the parameters are.
        orthogonalize: [k, rows, cols] -> the same shape; its second argument, [k] fp32, takes the
            matrices' norms.
        peaks: state of Muon's idle floor, fp32, one a placement; only the entries of this rank's
            home matrices are used. ``None``: no floor.
    """

    def __init__(
        self,
        placements: Sequence[Placement],
        plan: Plan,
        domain: Domain,
        group: dist.ProcessGroup,
        dtype: torch.dtype,
        device: torch.device,
        orthogonalize: Orthogonalize,
        peaks: Tensor | None = None,
    ) -> None:
        self._placements, self._homes = placements, plan.homes
        self._domain, self.group = domain, group
        self._dtype, self._device, self._orthogonalize = dtype, device, orthogonalize
        self._peaks = peaks
        self._positions: dict[tuple[int, ...], Tensor] = {}
        self.rank = group.rank()
        """This rank in the domain."""
        self._buckets: dict[int, list[int]] = defaultdict(list)
        for index, placement in enumerate(placements):
            self._buckets[placement.bucket].append(index)
        self._local_buckets = {
            bucket
            for bucket, members in self._buckets.items()
            if all(lies_whole_on(placements[i], domain) == plan.homes[i] for i in members)
        }
        self.num_orthogonalized = 0
        """Matrices this rank has orthogonalised, over all steps."""

    def run(self, directions: Directions, apply: Apply) -> None:
        """Orthogonalise what all ranks of the domain hold together, a bucket after another.

        While one bucket is orthogonalised, the next one's pieces and the last one's results are
        under way, and no others: that bounds the memory of a step.

        Args:
            directions: given placements of one bucket, for each that this rank holds a part of that
                part of the direction, flat.
            apply: takes for the same placements the same part of U Vᵀ, flat, in the exchange's
                dtype.
        """
        if self._domain.size == 1:
            for members in self._buckets.values():
                apply(self._alone(directions(members)))
            return
        buckets = list(self._buckets.values())
        outward = [self._send_outward(members, directions) for members in buckets[:1]]
        homeward: list[tuple[list[int], _Transfer]] = []
        for number, members in enumerate(buckets):
            outward += [
                self._send_outward(after, directions) for after in buckets[number + 1 :][:1]
            ]
            results = self._at_home(members, outward.pop(0))
            homeward.append((members, self._send_back(members, results)))
            del results
            if number:
                apply(self._unpack(*homeward.pop(0)))
        for members, transfer in homeward:
            apply(self._unpack(members, transfer))

    def _alone(self, directions: dict[int, Tensor]) -> dict[int, Tensor]:
        """In a domain of one rank every matrix lies whole at its home, and nothing moves."""
        whole = {
            index: directions.pop(index).to(self._dtype).view(self._placements[index].shape)
            for index in list(directions)  # popped, so that fp32 and the copy are not all alive
        }
        return {index: X.flatten() for index, X in self._newton_schulz(whole).items()}

    def _sends(self, index: int, rank: int) -> bool:
        return sends(self._placements[index], self._domain, self._homes[index], rank)

    def _send_outward(self, members: list[int], make: Directions) -> _Transfer:
        directions = make(members)
        parts: list[list[Tensor]] = [[] for _ in range(self._domain.size)]
        for index in members:
            if index in directions and self._sends(index, self.rank):
                parts[self._homes[index]].append(directions[index].to(self._dtype))
        mine = [index for index in members if self._homes[index] == self.rank]
        sizes = [
            sum(self._length(index, rank) for index in mine if self._sends(index, rank))
            for rank in range(self._domain.size)
        ]
        return self._start(members, parts, sizes)

    def _length(self, index: int, rank: int) -> int:
        start, end = held(self._placements[index], self._domain, rank)
        return end - start

    def _at_home(self, members: list[int], transfer: _Transfer) -> dict[int, Tensor]:
        """This home's matrices, put together and orthogonalised."""
        received = [reader(chunk) for chunk in transfer.wait()]
        whole: dict[int, Tensor] = {}
        for index in members:
            if self._homes[index] != self.rank:
                continue
            shards: dict[int, list[Tensor]] = defaultdict(list)
            for rank in range(self._domain.size):
                if self._sends(index, rank):
                    length = self._length(index, rank)
                    shards[self._domain.coordinates(rank)[1]].append(received[rank](length))
            flat = [joined(shards[tensor_rank]) for tensor_rank in sorted(shards)]
            whole[index] = self._assembled(self._placements[index], flat)
        return self._newton_schulz(whole)

    def _assembled(self, placement: Placement, flat: list[Tensor]) -> Tensor:
        """The whole matrix from its tensor-parallel shards."""
        dim = placement.partition_dim
        if dim < 0:
            return flat[0].view(placement.shape)
        rows, cols = placement.shape
        shape = (-1, cols) if dim == 0 else (rows, -1)
        return torch.cat([shard.view(shape) for shard in flat], dim=dim)

    def _newton_schulz(self, whole: dict[int, Tensor]) -> dict[int, Tensor]:
        by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index in whole:
            by_shape[self._placements[index].shape].append(index)
        results: dict[int, Tensor] = {}
        for shape, indices in by_shape.items():
            size = batch_size(*shape, self._dtype, self._device) or len(indices)
            for batch in itertools.batched(indices, size):
                matrices = torch.stack([whole[index] for index in batch])
                results.update(zip(batch, self._update(matrices, batch), strict=True))
        self.num_orthogonalized += len(results)
        return {index: results[index] for index in whole}  # the order in which all ranks unpack

    def _update(self, batch: Tensor, indices: tuple[int, ...]) -> Tensor:
        """U Vᵀ of each [rows, cols] of ``batch``, faded where the matrix has gone idle."""
        norms = torch.empty(len(indices), device=self._device)
        update = self._orthogonalize(batch, norms)
        if self._peaks is None:
            return update
        if indices not in self._positions:
            self._positions[indices] = torch.tensor(indices, device=self._device)
        where = self._positions[indices]
        peaks = self._peaks[where]
        factor = idle_factor(norms, peaks)
        self._peaks[where] = peaks
        return update.mul_(factor[:, None, None].to(update.dtype))

    def _send_back(self, members: list[int], results: dict[int, Tensor]) -> _Transfer:
        tensor_ranks = self._domain.tensor_ranks
        parts: list[list[Tensor]] = [[] for _ in range(self._domain.size)]
        for index, matrix in results.items():
            placement = self._placements[index]
            dim = placement.partition_dim
            shards = [
                X.flatten() for X in (matrix.chunk(tensor_ranks, dim) if dim >= 0 else [matrix])
            ]
            for rank in holders(placement, self._domain):
                start, end = held(placement, self._domain, rank)
                shard = shards[self._domain.coordinates(rank)[1] % len(shards)]
                parts[rank].append(shard[start:end])
        sizes = [0] * self._domain.size
        for index in members:
            sizes[self._homes[index]] += self._length(index, self.rank)
        return self._start(members, parts, sizes)

    def _unpack(self, members: list[int], transfer: _Transfer) -> dict[int, Tensor]:
        received = [reader(chunk) for chunk in transfer.wait()]
        return {
            index: received[self._homes[index]](length)
            for index in members
            if (length := self._length(index, self.rank))
        }

    def _start(self, members: list[int], parts: list[list[Tensor]], sizes: list[int]) -> _Transfer:
        flat = [part for to_rank in parts for part in to_rank]
        empty = torch.empty(0, dtype=self._dtype, device=self._device)
        send = torch.cat(flat) if flat else empty
        if self._placements[members[0]].bucket in self._local_buckets:
            return _Transfer(send, sizes, None, send)
        received = torch.empty(sum(sizes), dtype=self._dtype, device=self._device)
        send_sizes = [sum(part.numel() for part in to_rank) for to_rank in parts]
        work = dist.all_to_all_single(
            received, send, sizes, send_sizes, group=self.group, async_op=True
        )
        return _Transfer(received, sizes, work, send)


def joined(parts: list[Tensor]) -> Tensor:
    """``torch.cat``, without the copy where there is one part."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def reader(flat: Tensor) -> Callable[[int], Tensor]:
    """A reader that takes the next ``n`` elements of ``flat`` each time it is called."""
    position = 0

    def take(length: int) -> Tensor:
        nonlocal position
        position += length
        return flat[position - length : position]

    return take
