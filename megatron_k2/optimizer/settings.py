"""MuonClip's settings, read once from Megatron's flags."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from megatron_k2.optimizer.newton_schulz.coefficients import coefficient_set
from megatron_k2.optimizer.newton_schulz.cost import SymmetricMethod
from megatron_k2.optimizer.newton_schulz.gram_restarts import restart_segments
from megatron_k2.optimizer.param_groups import K2_OPTIONS, MatrixOptions

if TYPE_CHECKING:
    from megatron_k2.optimizer.qk_clip.factors import GroupedQueryMode


@dataclass(frozen=True)
class MuonClipSettings:
    """What MuonClip takes from flags; ``from_config`` reads Megatron's."""

    momentum: float
    """μ, what the momentum keeps of itself at each step; Moonlight: 0.95."""
    nesterov: bool
    coefficients: str
    """Name of Newton-Schulz's polynomials, a key of ``coefficients.COEFFICIENTS``."""
    steps: int
    scale_factor: float
    """Update RMS; the report's 0.2."""
    dtype: torch.dtype
    """What is exchanged and orthogonalised in; masters and momenta are fp32."""
    qk_clip_threshold: float
    """τ, the largest logit that a head may have without being clipped; the report: 100."""
    qk_clip_alpha: float
    """α: the query's share of γ where both sides are the head's own."""
    grouped_query_mode: "GroupedQueryMode"
    """Which heads grouped-query attention scales, see ``qk_clip.gqa_row_scale``."""
    has_idle_floor: bool
    """Whether a matrix without gradients fades out (``muon.idle_factor``)."""
    matrices: MatrixOptions = K2_OPTIONS
    """What counts as one matrix."""
    clip_grad_scope: str = "all"
    """Whose gradients ``--clip-grad`` scales: ``all`` or ``adam``, see ``muonclip_chain``."""
    has_statistics: bool = False
    """Whether each step's update RMS and seconds are logged, see ``step_statistics``."""
    offload_fraction: float = 0.0
    """Part of the optimizer's states in host memory (``offload/optimizer.py``)."""

    symmetric_on_gpu: SymmetricMethod | None = None
    """How a GPU forms symmetric products, see ``newton_schulz.iteration.symmetric_method``."""

    @property
    def segments(self) -> tuple[int, ...]:
        """Newton-Schulz steps between restarts of its Gram form."""
        return restart_segments(coefficient_set(self.coefficients).take(self.steps), self.dtype)


MEGATRON_COEFFICIENTS = {"simple": "jordan", "quintic": "quintic", "polar_express": "polar_express"}
"""Value of ``--muon-coefficient-type`` -> name of our set of coefficients."""


SYMMETRIC_ON_GPU: dict[bool | None, SymmetricMethod | None] = {
    None: None,
    True: "triton",
    False: "none",
}
"""Value of ``--muonclip-triton-symmetric`` -> what it asks for."""


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
        has_statistics=args.log_muon_steps,
        offload_fraction=args.optimizer_offload_fraction if args.muonclip_cpu_offload else 0.0,
        symmetric_on_gpu=SYMMETRIC_ON_GPU[args.muonclip_triton_symmetric],
    )
