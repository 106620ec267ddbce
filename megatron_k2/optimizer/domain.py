"""The ranks that share matrices, and the exchange among them, built from process groups."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_k2.optimizer.coefficients import coefficient_set
from megatron_k2.optimizer.exchange import MatrixExchange
from megatron_k2.optimizer.gram_restarts import restart_segments
from megatron_k2.optimizer.newton_schulz import orthogonalize
from megatron_k2.optimizer.param_groups import K2_OPTIONS, MatrixOptions, MatrixSpec, as_matrix
from megatron_k2.optimizer.plan import Domain, Placement, Plan, make_plan
from megatron_k2.optimizer.qk_clip import GroupedQueryMode


@dataclass(frozen=True)
class MuonClipSettings:
    """What MuonClip takes from flags; ``from_config`` reads Megatron's."""

    momentum: float
    """μ."""
    nesterov: bool
    coefficients: str
    """A key of ``coefficients.COEFFICIENTS``."""
    steps: int
    scale_factor: float
    """Update RMS; the report's 0.2."""
    dtype: torch.dtype
    """Of the exchange and of Newton-Schulz."""
    qk_clip_threshold: float
    """τ."""
    qk_clip_alpha: float
    """α: the query's share of γ where both sides are the head's own."""
    grouped_query_mode: GroupedQueryMode
    """Which heads grouped-query attention scales, see ``qk_clip.gqa_row_scale``."""
    has_idle_floor: bool
    """Whether a matrix without gradients fades out (``muon.idle_factor``)."""
    matrices: MatrixOptions = K2_OPTIONS
    """What counts as one matrix."""
    clip_grad_scope: str = "all"
    """See ``grad_scope``."""

    @property
    def segments(self) -> tuple[int, ...]:
        """Newton-Schulz steps between restarts of its Gram form."""
        return restart_segments(coefficient_set(self.coefficients).take(self.steps), self.dtype)


MEGATRON_COEFFICIENTS = {"simple": "jordan", "quintic": "quintic", "polar_express": "polar_express"}
"""``--muon-coefficient-type`` -> our table."""


def settings_from(args: Any, transformer: Any) -> MuonClipSettings:
    """Megatron's ``--muon-*`` and ``--qk-clip-*`` flags, and ours."""
    return MuonClipSettings(
        momentum=args.muon_momentum,
        nesterov=args.muon_nesterov,
        coefficients=MEGATRON_COEFFICIENTS[args.muon_coefficient_type],
        steps=args.muon_num_ns_steps,
        scale_factor=args.muon_extra_scale_factor,
        dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[args.muonclip_dtype],
        qk_clip_threshold=transformer.qk_clip_threshold,
        qk_clip_alpha=transformer.qk_clip_alpha,
        grouped_query_mode=args.qk_clip_grouped_query,
        has_idle_floor=not args.no_muon_idle_floor,
        matrices=MatrixOptions(args.muon_per_head, args.muon_router == "muon"),
        clip_grad_scope=args.clip_grad_scope,
    )


@dataclass(frozen=True)
class MatrixParameter:
    """A Muon parameter as every rank of its domain knows it."""

    name: str
    param: torch.nn.Parameter
    spec: MatrixSpec
    pieces: tuple[tuple[int, int], ...]
    """[start, end) of the flat tensor-parallel shard, a data-parallel rank each."""
    bucket: int


class MuonDomain:
    """Matrices of one optimizer: dense ones over TP x DP x CP, experts over expert-TP x expert-DP.

    Attributes:
        matrices: in the order of the plan.
        plan: homes and loads.
        exchange: the collective part.
        peaks: idle-floor state, see ``MatrixExchange``.
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
        domain = Domain(tensor_ranks=tensor_group.size(), data_ranks=data_group.size())
        placements = [_placement(m, domain, is_data_replicated) for m in self.matrices]
        self.plan: Plan = make_plan(placements, domain, settings.segments, seed_loads)
        device = self.matrices[0].param.device if self.matrices else torch.device("cpu")
        num_blocks = sum(len(placement.block_shapes) for placement in placements)
        self.peaks = torch.zeros(num_blocks, device=device) if settings.has_idle_floor else None

        def newton_schulz(batch: Tensor) -> Tensor:
            return orthogonalize(
                batch,
                coefficients=settings.coefficients,
                steps=settings.steps,
                dtype=settings.dtype,
            )

        self.exchange = MatrixExchange(
            placements,
            [m.spec for m in self.matrices],
            [as_matrix(m.param.shape) for m in self.matrices],
            self.plan,
            domain,
            _joint_group(data_group, tensor_group, domain),
            settings.dtype,
            device,
            newton_schulz,
            self.peaks,
        )
        self._blocks = {
            m.param: p.block_shapes for m, p in zip(self.matrices, placements, strict=True)
        }
        self._index = {m.param: i for i, m in enumerate(self.matrices)}
        counts = [len(placement.block_shapes) for placement in placements]
        self._first_block = list(itertools.accumulate(counts, initial=0))

    def run(self, directions: dict[torch.nn.Parameter, Tensor]) -> dict[torch.nn.Parameter, Tensor]:
        """``MatrixExchange.run`` keyed by parameter."""
        results = self.exchange.run({self._index[p]: part for p, part in directions.items()})
        return {self.matrices[index].param: part for index, part in results.items()}

    def block_shape(self, param: torch.nn.Parameter) -> tuple[int, int]:
        """[rows, cols] of each whole matrix in ``param`` (gate and up, or heads, have the same)."""
        return self._blocks[param][0]

    def pieces(self, param: torch.nn.Parameter) -> tuple[tuple[int, int], ...]:
        """[start, end) of the flat shard of ``param`` on each data-parallel rank."""
        return self.matrices[self._index[param]].pieces

    def peaks_of(self, param: torch.nn.Parameter) -> Tensor:
        """This parameter's idle-floor state, a view: one value a whole matrix."""
        assert self.peaks is not None
        first = self._first_block[self._index[param]]
        return self.peaks[first : first + len(self._blocks[param])]

    def share_peaks(self) -> None:
        """Give every rank the homes' idle-floor state; elsewhere it is not kept up."""
        if self.peaks is None:
            return
        for m, home in zip(self.matrices, self.plan.homes, strict=True):
            if home != self.exchange.rank:
                self.peaks_of(m.param).zero_()
        if self.exchange.group.size() > 1:
            dist.all_reduce(self.peaks, op=dist.ReduceOp.MAX, group=self.exchange.group)


def _placement(m: MatrixParameter, domain: Domain, is_data_replicated: bool) -> Placement:
    shape = m.spec.whole_shape(as_matrix(m.param.shape), domain.tensor_ranks)
    return Placement(
        name=m.name,
        block_shapes=(shape,) * m.spec.whole_blocks(domain.tensor_ranks),
        pieces=m.pieces,
        is_tensor_parallel=m.spec.partition_dim >= 0 and domain.tensor_ranks > 1,
        bucket=m.bucket,
        is_data_replicated=is_data_replicated,
    )


def _joint_group(
    data_group: dist.ProcessGroup, tensor_group: dist.ProcessGroup, domain: Domain
) -> dist.ProcessGroup:
    """The group whose rank is ``Domain.rank(data rank, tensor rank)``."""
    if domain.tensor_ranks == 1:
        return data_group
    if domain.data_ranks == 1:
        return tensor_group
    joint = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    if joint.size() != domain.size or joint.rank() != domain.rank(
        data_group.rank(), tensor_group.rank()
    ):
        raise ValueError(
            f"no process group spans tensor x data ranks {domain.tensor_ranks} x "
            f"{domain.data_ranks} of this optimizer; expert tensor parallelism together with "
            "expert data parallelism is not supported, use --expert-tensor-parallel-size 1"
        )
    return joint
