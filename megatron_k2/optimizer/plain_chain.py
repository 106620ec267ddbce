"""Megatron's chain of MuonClip and AdamW without ZeRO."""

from typing import override

from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor

from megatron_k2.optimizer.grad_scope import GradScopeChain
from megatron_k2.optimizer.plain import MuonClip


class PlainMuonClipChain(GradScopeChain):
    """The registry's chain; made of a finished one by ``adopt``."""

    @classmethod
    def adopt(cls, chain: ChainedOptimizer) -> "PlainMuonClipChain":
        """Turn ``chain`` into this class."""
        chain.__class__ = cls
        adopted: PlainMuonClipChain = chain
        return adopted

    @override
    def adamw_parameters(self, optimizer: MegatronOptimizer) -> list[Tensor]:
        return [] if isinstance(optimizer.optimizer, MuonClip) else optimizer.get_parameters()
