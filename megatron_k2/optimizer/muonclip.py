"""The door through which Megatron builds MuonClip, in either form.

Kimi K2 report (arXiv:2507.20534), Algorithm 1: a Muon step on every matrix, then QK-Clip on the
heads whose largest logit exceeded τ. AdamW takes the rest.

- With ``--use-distributed-optimizer``: ``sharded.optimizer.DistributedMuonClip`` adopts the
  optimizers that Megatron's factory built in ``adam`` mode (``offload.optimizer.OffloadedMuonClip``
  with part of their states on the host).
- Without: ``plain.MuonClip``, registered in Megatron's optimizer registry.
"""

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.emerging_optimizers import (
    _EMERGING_OPTIMIZERS,
    EmergingOptimizerEntry,
)
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_k2.optimizer.adamw import fuse_on_cpu
from megatron_k2.optimizer.offload.optimizer import OffloadedMuonClip
from megatron_k2.optimizer.param_groups import muon_matrices
from megatron_k2.optimizer.plain import MuonClip
from megatron_k2.optimizer.plain_chain import PlainMuonClipChain
from megatron_k2.optimizer.qk_clip.max_logits import MaxLogits
from megatron_k2.optimizer.settings import MuonClipSettings
from megatron_k2.optimizer.sharded.chain import MuonClipChain
from megatron_k2.optimizer.sharded.optimizer import DistributedMuonClip


def register(
    model_chunks: list[torch.nn.Module], max_logits: MaxLogits, settings: MuonClipSettings
) -> None:
    """Make ``muonclip`` known to Megatron's optimizer factory, for this one model.

    Megatron's own rule sends every parameter that is not two-dimensional to AdamW, experts stored
    as [e, rows, cols] among them; the override here goes by ``muon_matrices``.
    """
    specs = muon_matrices(model_chunks, settings.matrices)

    def kwargs(
        config: Any, model_chunks: list[Any], pg_collection: ProcessGroupCollection
    ) -> dict[str, Any]:
        return {
            "model_chunks": model_chunks,
            "specs": specs,
            "pg_collection": pg_collection,
            "max_logits": max_logits,
            "settings": settings,
            "lr": config.lr,
        }

    _EMERGING_OPTIMIZERS["muonclip"] = EmergingOptimizerEntry(
        optimizer_cls=MuonClip,
        init_state_fn=lambda optimizer, config=None: optimizer.init_state(),
        config_to_kwargs=kwargs,
        default_param_overrides={
            ParamKey(
                predicate=ParamPredicate(name="not_a_muon_matrix", fn=lambda p: p not in specs)
            ): {"optimizer": "adam"}
        },
    )


def adopt_plain(optimizer: Any, settings: MuonClipSettings) -> PlainMuonClipChain:
    """Turn the chain that the registry's ``muonclip`` gave into ours."""
    adopted = PlainMuonClipChain.adopt(optimizer)
    adopted.limit_clipping(settings.clip_grad_scope)
    fuse_on_cpu(adopted)
    return adopted


def adopt_distributed(
    optimizer: Any,
    model_chunks: list[torch.nn.Module],
    max_logits: MaxLogits,
    settings: MuonClipSettings,
) -> MuonClipChain:
    """Turn every ``DistributedOptimizer`` in ``optimizer`` into a ``DistributedMuonClip``.

    Experts first: their load decides how many dense matrices a rank is given.
    """
    groups = ProcessGroupCollection.use_mpu_process_groups()
    specs = muon_matrices(model_chunks, settings.matrices)
    parts = [o for o in optimizer.chained_optimizers if isinstance(o, DistributedOptimizer)]

    def is_expert(part: DistributedOptimizer) -> bool:
        return any(not getattr(b.params[0], "allreduce", True) for b in part.buffers if b.params)

    kind = OffloadedMuonClip if settings.offload_fraction else DistributedMuonClip
    chain = MuonClipChain.adopt(optimizer)
    expert_load = 0
    for part in sorted(parts, key=is_expert, reverse=True):
        if part.is_stub_optimizer:
            continue
        if is_expert(part):
            adopted = kind.adopt(
                part,
                specs,
                settings,
                None,
                tensor_group=groups.expt_tp,
                data_cp_group=groups.dp_cp,
            )
            expert_load = adopted.domain.plan.loads[adopted.domain.exchange.rank]
        else:
            kind.adopt(
                part,
                specs,
                settings,
                max_logits,
                tensor_group=groups.tp,
                data_cp_group=groups.dp_cp,
                seed_loads=_gather(expert_load, part.data_parallel_group, groups.tp),
            )
    chain.limit_clipping(settings.clip_grad_scope)
    fuse_on_cpu(chain)
    chain.gather_weights_once()
    return chain


def _gather(load: int, data_group: Any, tensor_group: Any) -> list[int]:
    """Every domain rank's expert load, tensor rank fastest."""
    loads: list[Any] = [None] * tensor_group.size()
    torch.distributed.all_gather_object(loads, load, group=tensor_group)
    rows: list[Any] = [None] * data_group.size()
    torch.distributed.all_gather_object(rows, loads, group=data_group)
    return [value for row in rows for value in row]
