"""Megatron's chain of MuonClip and AdamW without ZeRO."""

from typing import Any, override

from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_k2.optimizer.adamw import fuse_on_cpu
from megatron_k2.optimizer.foreign_state import (
    adopt_groups,
    inner,
    parts,
    take_over,
    upstream_momentum,
)
from megatron_k2.optimizer.muonclip_chain import MuonAdamWChain
from megatron_k2.optimizer.plain import MuonClip


class PlainMuonClipChain(MuonAdamWChain):
    """The registry's chain, turned into this class by ``muonclip.build``.

    Its checkpoint format is Megatron's; what Megatron's own ``muon`` wrote loads
    (``foreign_state``).
    """

    @override
    def adamw_parameters(self, optimizer: MegatronOptimizer) -> list[Tensor]:
        return [] if isinstance(optimizer.optimizer, MuonClip) else optimizer.get_parameters()

    @override
    def muon_of(self, optimizer: MegatronOptimizer) -> MuonClip | None:
        return optimizer.optimizer if isinstance(optimizer.optimizer, MuonClip) else None

    @override
    def sharded_state_dict(
        self, model_sharded_state_dict: Any, is_loading: bool = False, **kwargs: Any
    ) -> Any:
        described = super().sharded_state_dict(model_sharded_state_dict, is_loading, **kwargs)
        if is_loading:  # the file's groups need not be as many as ours
            for part in parts(described):
                del inner(part)["param_groups"]
        return described

    @override
    def load_state_dict(self, state_dict: Any) -> None:
        mu = upstream_momentum(state_dict)
        own_groups = [o.optimizer.state_dict()["param_groups"] for o in self.chained_optimizers]
        if mu is None:
            adopt_groups(state_dict, own_groups)
        else:
            take_over(state_dict, mu, own_groups)
        super().load_state_dict(state_dict)
        fuse_on_cpu(self)
