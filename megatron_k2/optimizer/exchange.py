"""Flat shards to whole matrices at their homes, and back: two all-to-alls a bucket.

None where every matrix of the bucket lies whole at home already (``expert_layout``).

Outward, every rank sends each home the pieces of its matrices; the home puts them together,
orthogonalises matrices of one shape in one batch, and sends each rank its part of the result. All
buckets' outward exchanges are started at once and finished in order, so that while one bucket is
orthogonalised the next one's pieces and the last one's results are under way.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_k2.optimizer.muon import idle_factor
from megatron_k2.optimizer.newton_schulz import batch_size, frobenius_norm
from megatron_k2.optimizer.param_groups import MatrixSpec
from megatron_k2.optimizer.plan import Domain, Placement, Plan, lies_whole_on, sends

Orthogonalize = Callable[[Tensor], Tensor]


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
        placements: all Muon parameters of the domain, the same on each of its ranks.
        specs: layout of each, in the same order.
        local_shapes: [rows, cols] of each one's tensor-parallel shard.
        plan: their homes.
        domain: shape of the domain.
        group: its process group; group rank r is domain rank r.
        dtype: of what is sent and orthogonalised.
        device: where the parameters are.
        orthogonalize: [k, rows, cols] -> the same shape.
        peaks: state of Muon's idle floor, fp32, one a whole matrix in the placements' order; only
            the entries of this rank's home matrices are used. ``None``: no floor.
    """

    def __init__(
        self,
        placements: Sequence[Placement],
        specs: Sequence[MatrixSpec],
        local_shapes: Sequence[tuple[int, int]],
        plan: Plan,
        domain: Domain,
        group: dist.ProcessGroup,
        dtype: torch.dtype,
        device: torch.device,
        orthogonalize: Orthogonalize,
        peaks: Tensor | None = None,
    ) -> None:
        self._placements, self._specs, self._shapes = placements, specs, local_shapes
        self._homes, self._domain, self.group = plan.homes, domain, group
        self._dtype, self._device, self._orthogonalize = dtype, device, orthogonalize
        self._peaks = peaks
        counts = [len(placement.block_shapes) for placement in placements]
        self._first_block = list(itertools.accumulate(counts, initial=0))
        self._block_ids: dict[tuple[int, ...], Tensor] = {}
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

    def run(self, directions: dict[int, Tensor]) -> dict[int, Tensor]:
        """Orthogonalise what all ranks of the domain hold together.

        Args:
            directions: for each placement this rank holds a part of, that part of the direction,
                flat.

        Returns:
            For the same placements the same part of U Vᵀ, flat, in the exchange's dtype.
        """
        if self._domain.size == 1:
            return self._run_alone(directions)
        outward = {
            bucket: self._send_outward(members, directions)
            for bucket, members in self._buckets.items()
        }
        homeward = {
            bucket: self._send_back(members, self._at_home(members, outward.pop(bucket)))
            for bucket, members in self._buckets.items()
        }
        return {
            index: part
            for bucket, members in self._buckets.items()
            for index, part in self._unpack(members, homeward.pop(bucket)).items()
        }

    def _run_alone(self, directions: dict[int, Tensor]) -> dict[int, Tensor]:
        """``run`` in a domain of one rank: every matrix lies whole at its home, nothing moves."""
        whole = {
            index: self._specs[index].assemble([part.to(self._dtype).view(self._shapes[index])])
            for index, part in directions.items()
        }
        return {
            index: self._specs[index].own_part(matrices, 0, 1).flatten()
            for index, matrices in self._newton_schulz(whole).items()
        }

    def _piece(self, index: int, rank: int) -> tuple[int, int]:
        return self._placements[index].pieces[self._domain.coordinates(rank)[0]]

    def _sends(self, index: int, rank: int) -> bool:
        return sends(self._placements[index], self._domain, self._homes[index], rank)

    def _send_outward(self, members: list[int], directions: dict[int, Tensor]) -> _Transfer:
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
        start, end = self._piece(index, rank)
        return end - start

    def _at_home(self, members: list[int], transfer: _Transfer) -> dict[int, list[Tensor]]:
        """Whole matrices of this home's placements, orthogonalised."""
        received = [reader(chunk) for chunk in transfer.wait()]
        whole: dict[int, list[Tensor]] = {}
        for index in members:
            if self._homes[index] != self.rank:
                continue
            shards: dict[int, list[Tensor]] = defaultdict(list)
            for rank in range(self._domain.size):
                if self._sends(index, rank):
                    length = self._length(index, rank)
                    shards[self._domain.coordinates(rank)[1]].append(received[rank](length))
            flat = [_joined(shards[tensor_rank]) for tensor_rank in sorted(shards)]
            spec, shape = self._specs[index], self._shapes[index]
            whole[index] = spec.assemble([shard.view(shape) for shard in flat])
        return self._newton_schulz(whole)

    def _newton_schulz(self, whole: dict[int, list[Tensor]]) -> dict[int, list[Tensor]]:
        by_shape: dict[tuple[int, int], list[tuple[int, Tensor]]] = defaultdict(list)
        for index, of_one in whole.items():
            for offset, matrix in enumerate(of_one):
                rows, cols = matrix.shape
                by_shape[rows, cols].append((self._first_block[index] + offset, matrix))
        results: dict[int, Tensor] = {}
        for shape, blocks in by_shape.items():
            size = batch_size(*shape, self._dtype, self._device) or len(blocks)
            for first in range(0, len(blocks), size):
                ids, matrices = zip(*blocks[first : first + size], strict=True)
                results.update(zip(ids, self._update(torch.stack(matrices), ids), strict=True))
        self.num_orthogonalized += len(results)
        return {
            index: [results[self._first_block[index] + i] for i in range(len(matrices))]
            for index, matrices in whole.items()
        }

    def _update(self, batch: Tensor, ids: tuple[int, ...]) -> Tensor:
        """U Vᵀ of each [rows, cols] of ``batch``, faded where the matrix has gone idle."""
        update = self._orthogonalize(batch)
        if self._peaks is None:
            return update
        if ids not in self._block_ids:
            self._block_ids[ids] = torch.tensor(ids, device=self._device)
        where = self._block_ids[ids]
        peaks = self._peaks[where]
        factor = idle_factor(frobenius_norm(batch), peaks)
        self._peaks[where] = peaks
        return update.mul_(factor[:, None, None].to(update.dtype))

    def _send_back(self, members: list[int], results: dict[int, list[Tensor]]) -> _Transfer:
        tensor_ranks = self._domain.tensor_ranks
        parts: list[list[Tensor]] = [[] for _ in range(self._domain.size)]
        for index, matrices in results.items():
            spec = self._specs[index]
            shards = [
                spec.own_part(matrices, tensor_rank, tensor_ranks).flatten()
                for tensor_rank in range(tensor_ranks if spec.partition_dim >= 0 else 1)
            ]
            for rank in range(self._domain.size):
                start, end = self._piece(index, rank)
                if end > start:
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


def _joined(parts: list[Tensor]) -> Tensor:
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
