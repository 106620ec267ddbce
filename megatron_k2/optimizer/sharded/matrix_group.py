"""The ranks that share matrices, and the exchange among them, built from process groups."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_k2.optimizer.newton_schulz.cost import newton_schulz_flops
from megatron_k2.optimizer.newton_schulz.iteration import orthogonalize, symmetric_method
from megatron_k2.optimizer.param_groups import MatrixSpec, as_matrix
from megatron_k2.optimizer.settings import MuonClipSettings
from megatron_k2.optimizer.sharded.exchange import MatrixExchange, Orthogonalize
from megatron_k2.optimizer.sharded.homes import (
    Assignment,
    Placement,
    RankGrid,
    assign_homes,
    held,
    matrix_placements,
)
from megatron_k2.optimizer.sharded.transfer import joined
from megatron_k2.optimizer.step_statistics import StepStatistics


@dataclass(frozen=True)
class MatrixParameter:
    """A Muon parameter as every rank of its group knows it."""

    name: str
    param: torch.nn.Parameter
    spec: MatrixSpec
    pieces: tuple[tuple[int, int], ...]
    """[start, end) of the flat tensor-parallel shard, a data-parallel rank each."""
    bucket: int


class MatrixGroup:
    """Matrices of one optimizer: dense ones over TP x DP x CP, experts over expert-TP x expert-DP.

    Attributes:
        matrices: in the order of the placements.
        assignment: homes and loads.
        exchange: the collective part.
        peaks: idle-floor state, see ``MatrixExchange``.
        statistics: of the last step, if asked for.
    """

    def __init__(
        self,
        matrices: Sequence[MatrixParameter],
        data_group: dist.ProcessGroup,
        tensor_group: dist.ProcessGroup,
        settings: MuonClipSettings,
        *,
        is_data_replicated: bool = False,
        seed_loads: Sequence[int] | None = None,
    ) -> None:
        self.matrices = list(matrices)
        grid = RankGrid(tensor_ranks=tensor_group.size(), data_ranks=data_group.size())
        self._grid = grid
        self._blocks = [_placements(m, grid, is_data_replicated) for m in self.matrices]
        placements = [placement for blocks in self._blocks for placement in blocks]
        device = self.matrices[0].param.device if self.matrices else torch.device("cpu")
        costs = [_flops(placement, settings, device) for placement in placements]
        self.assignment: Assignment = assign_homes(placements, grid, costs, seed_loads)
        self.peaks = (
            torch.zeros(len(placements), device=device) if settings.has_idle_floor else None
        )
        self.statistics: StepStatistics | None = None
        if settings.has_statistics:
            are_experts = [
                m.spec.is_expert
                for m, blocks in zip(self.matrices, self._blocks, strict=True)
                for _ in blocks
            ]
            self.statistics = StepStatistics(are_experts, device)
        self.exchange = MatrixExchange(
            placements,
            self.assignment,
            grid,
            _joint_group(data_group, tensor_group, grid),
            settings.dtype,
            device,
            _orthogonalizer(settings, device),
            self.peaks,
            self.statistics,
        )
        self._index = {m.param: i for i, m in enumerate(self.matrices)}
        counts = [len(blocks) for blocks in self._blocks]
        self._first = list(itertools.accumulate(counts, initial=0))
        self._param_of = [
            m.param for m, count in zip(self.matrices, counts, strict=True) for _ in range(count)
        ]
        self._own_blocks = {m.param: self._find_own_blocks(i) for i, m in enumerate(self.matrices)}

    def run(
        self,
        directions: Callable[[list[torch.nn.Parameter]], dict[torch.nn.Parameter, Tensor]],
        apply: Callable[[dict[torch.nn.Parameter, Tensor]], None],
    ) -> None:
        """``MatrixExchange.run``, given and taking parameters in place of placements.

        Args:
            directions: given some of the parameters this rank has a part of, the flat part of each
                one's direction. Called once a parameter, for some at a time.
            apply: takes the same part of each one's update, in the exchange's dtype.
        """

        def parts(members: list[int]) -> dict[int, Tensor]:
            own = dict.fromkeys(self._param_of[i] for i in members)
            params = [param for param in own if self._own_blocks[param]]
            return {
                index: direction.narrow(0, offset, length)
                for param, direction in (directions(params) if params else {}).items()
                for index, offset, length in self._own_blocks[param]
            }

        def apply_parts(results: dict[int, Tensor]) -> None:
            own = dict.fromkeys(self._param_of[i] for i in results)
            apply({p: joined([results[i] for i, _, _ in self._own_blocks[p]]) for p in own})

        if self.statistics is not None:
            self.statistics.restart()
        self.exchange.run(parts, apply_parts)

    def _find_own_blocks(self, i: int) -> list[tuple[int, int, int]]:
        """Matrices of a parameter this rank has a part of: placement, offset in it, length."""
        found, offset = [], 0
        for number, placement in enumerate(self._blocks[i], start=self._first[i]):
            start, end = held(placement, self._grid, self.exchange.rank)
            if end > start:
                found.append((number, offset, end - start))
                offset += end - start
        return found

    def block_shape(self, param: torch.nn.Parameter) -> tuple[int, int]:
        """[rows, cols] of each whole matrix in ``param`` (gate and up, or heads, have the same)."""
        return self._blocks[self._index[param]][0].shape

    def pieces(self, param: torch.nn.Parameter) -> tuple[tuple[int, int], ...]:
        """[start, end) of the flat shard of ``param`` on each data-parallel rank."""
        return self.matrices[self._index[param]].pieces

    def peaks_of(self, param: torch.nn.Parameter) -> Tensor:
        """This parameter's idle-floor state, a view: one value a whole matrix."""
        assert self.peaks is not None
        i = self._index[param]
        return self.peaks[self._first[i] : self._first[i + 1]]

    def share_peaks(self) -> None:
        """Give every rank the homes' idle-floor state; elsewhere it is not kept up."""
        if self.peaks is None:
            return
        is_home = [home == self.exchange.rank for home in self.assignment.homes]
        self.peaks.mul_(torch.tensor(is_home, device=self.peaks.device))
        if self.exchange.group.size() > 1:
            dist.all_reduce(self.peaks, op=dist.ReduceOp.MAX, group=self.exchange.group)


def _flops(placement: Placement, settings: MuonClipSettings, device: torch.device) -> int:
    """What orthogonalising ``placement``'s matrix executes on ``device``."""
    symmetric = symmetric_method(
        *placement.shape, settings.dtype, device, settings.symmetric_on_gpu
    )
    return newton_schulz_flops(
        *placement.shape, settings.segments, symmetric=symmetric, dtype=settings.dtype
    )


def _orthogonalizer(settings: MuonClipSettings, device: torch.device) -> Orthogonalize:
    """Newton-Schulz as ``MatrixExchange`` calls it, by the run's settings."""

    def newton_schulz(batch: Tensor, norms: Tensor) -> Tensor:
        rows, cols = batch.shape[-2:]
        return orthogonalize(
            batch,
            coefficients=settings.coefficients,
            steps=settings.steps,
            dtype=settings.dtype,
            symmetric=symmetric_method(
                rows, cols, settings.dtype, device, settings.symmetric_on_gpu
            ),
            norms=norms,
        )

    return newton_schulz


def _placements(m: MatrixParameter, grid: RankGrid, is_data_replicated: bool) -> list[Placement]:
    template = Placement(
        name=m.name,
        shape=as_matrix(m.param.shape),
        pieces=m.pieces,
        partition_dim=m.spec.partition_dim,
        bucket=m.bucket,
        is_data_replicated=is_data_replicated,
    )
    return matrix_placements(
        template,
        m.spec.num_blocks,
        has_whole_blocks=m.spec.has_whole_blocks,
        tensor_ranks=grid.tensor_ranks,
    )


def _joint_group(
    data_group: dist.ProcessGroup, tensor_group: dist.ProcessGroup, grid: RankGrid
) -> dist.ProcessGroup:
    """The group whose rank is ``RankGrid.rank(data rank, tensor rank)``."""
    if grid.tensor_ranks == 1:
        return data_group
    if grid.data_ranks == 1:
        return tensor_group
    joint = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    if joint.size() != grid.size or joint.rank() != grid.rank(
        data_group.rank(), tensor_group.rank()
    ):
        raise ValueError(
            f"no process group spans tensor x data ranks {grid.tensor_ranks} x "
            f"{grid.data_ranks} of this optimizer; expert tensor parallelism together with "
            "expert data parallelism is not supported, use --expert-tensor-parallel-size 1"
        )
    return joint
