"""Flat shards to whole matrices at their homes, and back: two all-to-alls a bucket.

None where every matrix of the bucket lies whole at home already (one rank, ``expert_layout``).

Outward, every rank sends each home the pieces of its matrices; the home puts them together,
orthogonalises matrices of one shape in one batch, and sends each rank its part of the result. While
one bucket is orthogonalised, the next one's pieces and the last one's results are under way.

Matrices that stay are taken a batch of Newton-Schulz at a time through the whole step; no more of
their directions and results are alive than of one batch.
"""

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_k2.optimizer.muon import idle_factor
from megatron_k2.optimizer.newton_schulz.iteration import batch_size
from megatron_k2.optimizer.sharded.homes import (
    Assignment,
    Placement,
    RankGrid,
    held,
    holders,
    lies_whole_on,
    sends,
)
from megatron_k2.optimizer.sharded.transfer import Transfer, joined, reader, start
from megatron_k2.optimizer.step_statistics import Part, StepStatistics

Orthogonalize = Callable[[Tensor, Tensor], Tensor]
Directions = Callable[[list[int]], dict[int, Tensor]]
Apply = Callable[[dict[int, Tensor]], None]


class MatrixExchange:
    """The planned exchange of one group of ranks.

    Args:
        placements: all Muon matrices of the group, the same on each of its ranks.
        assignment: their homes.
        grid: shape of the group.
        group: its process group, whose rank r is rank r of the grid.
        dtype: of what is sent and orthogonalised.
        device: where the parameters are.
        orthogonalize: [k, rows, cols] -> the same shape; its second argument, [k] fp32, takes the
            matrices' norms.
        peaks: state of Muon's idle floor, fp32, one a placement; only the entries of this rank's
            home matrices are used. ``None``: no floor.
        statistics: told of every batch and of the time of the two parts. ``None``: not wanted.
    """

    def __init__(
        self,
        placements: Sequence[Placement],
        assignment: Assignment,
        grid: RankGrid,
        group: dist.ProcessGroup,
        dtype: torch.dtype,
        device: torch.device,
        orthogonalize: Orthogonalize,
        peaks: Tensor | None = None,
        statistics: StepStatistics | None = None,
    ) -> None:
        self._placements, self._homes = placements, assignment.homes
        self._grid, self.group = grid, group
        self._dtype, self._device, self._orthogonalize = dtype, device, orthogonalize
        self._peaks, self._statistics = peaks, statistics
        self._positions: dict[tuple[int, ...], Tensor] = {}
        self.rank = group.rank()
        """This rank in the group."""
        self._buckets: dict[int, list[int]] = defaultdict(list)
        for index, placement in enumerate(placements):
            self._buckets[placement.bucket].append(index)
        self._local_buckets = {
            bucket
            for bucket, members in self._buckets.items()
            if all(lies_whole_on(placements[i], grid) == assignment.homes[i] for i in members)
        }
        self.num_orthogonalized = 0
        """Matrices this rank has orthogonalised, over all steps."""

    def run(self, directions: Directions, apply: Apply) -> None:
        """Orthogonalise what all ranks of the group hold together, a bucket after another.

        While one bucket is orthogonalised, the next one's pieces and the last one's results are
        under way, and no others: that bounds the memory of a step. Buckets of which nothing is
        exchanged come first, while the first exchange is under way.

        Args:
            directions: given placements of some parameters of one bucket, for each that this rank
                holds a part of that part of the direction, flat. Called once a parameter.
            apply: takes for the same placements the same part of U Vᵀ, flat, in the exchange's
                dtype.
        """
        shared = [m for bucket, m in self._buckets.items() if bucket not in self._local_buckets]
        outward = [self._send_outward(members, directions) for members in shared[:1]]
        for bucket in self._local_buckets:
            for part in self._parts(self._mine(self._buckets[bucket])):
                self._give(self._alone(part, directions), apply)
        homeward: list[tuple[list[int], Transfer]] = []
        for number, members in enumerate(shared):
            outward += [self._send_outward(after, directions) for after in shared[number + 1 :][:1]]
            results = self._at_home(members, outward.pop(0))
            homeward.append((members, self._send_back(members, results)))
            del results
            if number:
                self._give(self._unpack(*homeward.pop(0)), apply)
        for members, transfer in homeward:
            self._give(self._unpack(members, transfer), apply)

    def _largest_batch(self, shape: tuple[int, int]) -> int | None:
        return batch_size(*shape, self._dtype, self._device)

    def _parts(self, members: list[int]) -> Iterator[list[int]]:
        """``members`` by shape, a batch of Newton-Schulz at a time, but parameters whole."""
        by_shape: dict[tuple[int, int], list[list[int]]] = defaultdict(list)
        for _, blocks in itertools.groupby(members, self._name):
            same = list(blocks)
            by_shape[self._placements[same[0]].shape].append(same)
        for shape, parameters in by_shape.items():
            largest = self._largest_batch(shape) or len(members)
            part: list[int] = []
            for same in parameters:
                if part and len(part) + len(same) > largest:
                    yield part
                    part = []
                part.extend(same)
            yield part

    def _asked(self, part: Sequence[int]) -> list[list[int]]:
        """``part`` as its directions are asked for: on a CPU a parameter at a time.

        What is written is then read while it is in the cache, and memory just freed is used again.
        """
        if self._device.type != "cpu":
            return [list(part)]
        return [list(same) for _, same in itertools.groupby(part, self._name)]

    def _name(self, index: int) -> str:
        return self._placements[index].name

    def _fill(self, places: dict[int, Tensor], part: Sequence[int], make: Directions) -> None:
        """Cast the directions of ``part`` into their flat places; those without one are dropped."""
        for asked in self._asked(part):
            found = make(asked)
            here = [index for index in asked if index in places]
            if here:
                torch._foreach_copy_([places[i] for i in here], [found[i] for i in here])

    def _give(self, results: dict[int, Tensor], apply: Apply) -> None:
        for asked in self._asked(list(results)):
            apply({index: results[index] for index in asked})

    def _alone(self, part: list[int], make: Directions) -> dict[int, Tensor]:
        """Matrices of one shape that lie whole at this home: nothing moves."""
        shape = self._placements[part[0]].shape
        stack = self._empty(len(part), *shape)
        self._fill(dict(zip(part, stack.flatten(1), strict=True)), part, make)
        size = self._largest_batch(shape) or len(part)
        results: dict[int, Tensor] = {}
        for batch, X in zip(itertools.batched(part, size), stack.split(size), strict=True):
            results.update(zip(batch, self._update(X, batch).flatten(1), strict=True))
        return results

    def _mine(self, members: list[int]) -> list[int]:
        return [index for index in members if self._homes[index] == self.rank]

    def _sends(self, index: int, rank: int) -> bool:
        return sends(self._placements[index], self._grid, self._homes[index], rank)

    def _send_outward(self, members: list[int], make: Directions) -> Transfer:
        to_homes: list[list[int]] = [[] for _ in range(self._grid.size)]
        for index in members:
            if self._sends(index, self.rank):
                to_homes[self._homes[index]].append(index)
        order = [index for to_home in to_homes for index in to_home]
        send = self._empty(sum(self._length(index, self.rank) for index in order))
        take = reader(send)
        places = {index: take(self._length(index, self.rank)) for index in order}
        self._fill(places, members, make)
        mine = self._mine(members)
        sizes = [
            sum(self._length(index, rank) for index in mine if self._sends(index, rank))
            for rank in range(self._grid.size)
        ]
        send_sizes = [sum(self._length(i, self.rank) for i in to_home) for to_home in to_homes]
        return self._start(send, send_sizes, sizes)

    def _length(self, index: int, rank: int) -> int:
        start, end = held(self._placements[index], self._grid, rank)
        return end - start

    def _at_home(self, members: list[int], transfer: Transfer) -> dict[int, Tensor]:
        """This home's matrices, put together and orthogonalised."""
        received = self._received(transfer)
        whole: dict[int, Tensor] = {}
        for index in self._mine(members):
            shards: dict[int, list[Tensor]] = defaultdict(list)
            for rank in range(self._grid.size):
                if self._sends(index, rank):
                    length = self._length(index, rank)
                    shards[self._grid.coordinates(rank)[1]].append(received[rank](length))
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
            for batch in itertools.batched(indices, self._largest_batch(shape) or len(indices)):
                matrices = self._stacked([whole[index] for index in batch])
                results.update(zip(batch, self._update(matrices, batch), strict=True))
        return {index: results[index] for index in whole}  # the order in which all ranks unpack

    def _stacked(self, matrices: list[Tensor]) -> Tensor:
        """[k, rows, cols] in the exchange's dtype: a view where it can be, else one copy."""
        if len(matrices) == 1:
            return matrices[0].to(self._dtype)[None]
        stacked = self._empty(len(matrices), *matrices[0].shape)
        torch._foreach_copy_(list(stacked), matrices)
        return stacked

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)

    def _update(self, batch: Tensor, indices: tuple[int, ...]) -> Tensor:
        """U Vᵀ of each [rows, cols] of ``batch``, faded where the matrix has gone idle."""
        self.num_orthogonalized += len(indices)
        norms = torch.empty(len(indices), device=self._device)
        with self._timing("newton_schulz"):
            update = self._orthogonalize(batch, norms)
        update = self._faded(update, norms, indices)
        if self._statistics is not None:
            self._statistics.add(update, indices)
        return update

    def _faded(self, update: Tensor, norms: Tensor, indices: tuple[int, ...]) -> Tensor:
        if self._peaks is None:
            return update
        if indices not in self._positions:
            self._positions[indices] = torch.tensor(indices, device=self._device)
        where = self._positions[indices]
        peaks = self._peaks[where]
        factor = idle_factor(norms, peaks)
        self._peaks[where] = peaks
        return update.mul_(factor[:, None, None].to(update.dtype))

    def _send_back(self, members: list[int], results: dict[int, Tensor]) -> Transfer:
        tensor_ranks = self._grid.tensor_ranks
        parts: list[list[Tensor]] = [[] for _ in range(self._grid.size)]
        for index, matrix in results.items():
            placement = self._placements[index]
            dim = placement.partition_dim
            shards = [
                X.flatten() for X in (matrix.chunk(tensor_ranks, dim) if dim >= 0 else [matrix])
            ]
            for rank in holders(placement, self._grid):
                start, end = held(placement, self._grid, rank)
                shard = shards[self._grid.coordinates(rank)[1] % len(shards)]
                parts[rank].append(shard[start:end])
        sizes = [0] * self._grid.size
        for index in members:
            sizes[self._homes[index]] += self._length(index, self.rank)
        flat = [part for to_rank in parts for part in to_rank]
        send = torch.cat(flat) if flat else self._empty(0)
        return self._start(send, [sum(p.numel() for p in to_rank) for to_rank in parts], sizes)

    def _unpack(self, members: list[int], transfer: Transfer) -> dict[int, Tensor]:
        received = self._received(transfer)
        return {
            index: received[self._homes[index]](length)
            for index in members
            if (length := self._length(index, self.rank))
        }

    def _start(self, send: Tensor, send_sizes: list[int], sizes: list[int]) -> Transfer:
        received = self._empty(sum(sizes))
        with self._timing("exchange"):
            return start(send, send_sizes, received, sizes, self.group)

    def _received(self, transfer: Transfer) -> list[Callable[[int], Tensor]]:
        """A reader of what each rank has sent."""
        with self._timing("exchange"):
            return [reader(chunk) for chunk in transfer.wait()]

    def _timing(self, part: Part) -> contextlib.AbstractContextManager[None]:
        if self._statistics is None:
            return contextlib.nullcontext()
        return self._statistics.timing(part)
