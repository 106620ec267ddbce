"""MuonClip as a run gets it: ``build`` makes it by Megatron's own factory, in one of two forms.

Kimi K2 report (arXiv:2507.20534), Algorithm 1: a Muon step on every matrix, then QK-Clip on the
heads whose largest logit exceeded τ. AdamW takes the rest.

- With ``--use-distributed-optimizer`` the factory builds ``DistributedOptimizer`` objects in
  ``adam`` mode, which become ``sharded.optimizer.DistributedMuonClip``
  (``offload.optimizer.OffloadedMuonClip`` with part of their states on the host).
- Without, it builds ``plain.MuonClip`` from its registry of optimizers.
"""

import importlib.util
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.emerging_optimizers import (
    _EMERGING_OPTIMIZERS,
    EmergingOptimizerEntry,
)
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_k2.errors import UserError
from megatron_k2.optimizer.adamw import fuse_on_cpu
from megatron_k2.optimizer.adopt import adopt
from megatron_k2.optimizer.classification import classification_table
from megatron_k2.optimizer.foreign_state import check_optimizer_state
from megatron_k2.optimizer.muonclip_chain import MuonAdamWChain
from megatron_k2.optimizer.offload.optimizer import OffloadedMuonClip
from megatron_k2.optimizer.param_groups import MatrixSpec, muon_matrices
from megatron_k2.optimizer.plain import MuonClip
from megatron_k2.optimizer.plain_chain import PlainMuonClipChain
from megatron_k2.optimizer.qk_clip.apply import check_clippable, row_scales
from megatron_k2.optimizer.qk_clip.max_logits import MaxLogits
from megatron_k2.optimizer.settings import MuonClipSettings, settings_from
from megatron_k2.optimizer.sharded.chain import FORMAT, MuonClipChain
from megatron_k2.optimizer.sharded.optimizer import DistributedMuonClip

Specs = dict[torch.nn.Parameter, MatrixSpec]


def build(
    factory: Callable[..., Any],
    args: Namespace,
    config: Any,
    model_chunks: list[Any],
    max_logits: MaxLogits,
    load: str | None,
    **kwargs: Any,
) -> MuonAdamWChain:
    """The optimizer of a run; rank 0 prints which parameter is whose.

    Args:
        factory: Megatron's ``get_megatron_optimizer``.
        args: Megatron's flags and ours.
        config: Megatron's ``OptimizerConfig``.
        model_chunks: of this rank, wrapped in DDP.
        max_logits: of the same chunks.
        load: the run whose optimizer state will be loaded, or None.
        **kwargs: the factory's other arguments. Parameter overrides are dropped: Megatron's exempt
            norms and biases from weight decay, and Moonlight (appendix D) calls decay on RMSNorm
            gains crucial. With none, everything decays.

    Returns:
        What the factory returned, the same object turned into ours.

    Raises:
        UserError: for attention that QK-Clip cannot act on, a checkpoint that cannot be continued,
            or a kernel that is asked for without Triton.
        ValueError: for a matrix that is not classified.
    """
    check_triton(args)
    check_clippable(max_logits)
    check_optimizer_state(args, FORMAT, load)
    settings = settings_from(args, model_chunks[0].config)
    if dist.get_rank() == 0:
        print(classification_table(model_chunks, settings.matrices))
    specs = muon_matrices(model_chunks, settings.matrices)
    _register(specs, max_logits, settings)
    built = factory(config, model_chunks, **{**kwargs, "config_overrides": {}})
    if config.use_distributed_optimizer:
        clipped = next(row_scales(max_logits, settings), None)
        watched = None if clipped is None else max_logits  # all frozen: the log takes the maxima
        chain: MuonAdamWChain = _over_zero(built, specs, watched, settings)
    else:
        chain = adopt(built, PlainMuonClipChain)
    chain.limit_clipping(settings.clip_grad_scope)
    fuse_on_cpu(chain)
    return chain


def check_triton(args: Namespace) -> None:
    """Refuse ``--muonclip-triton-symmetric`` where its kernel cannot be imported.

    Raises:
        UserError: naming the way out. On a CPU the flag has no effect and needs nothing.
    """
    is_asked = args.muonclip_triton_symmetric and torch.cuda.is_available()
    if is_asked and importlib.util.find_spec("triton") is None:
        raise UserError(
            "--muonclip-triton-symmetric: triton is not installed; pip install triton, or drop it"
        )


def _register(specs: Specs, max_logits: MaxLogits, settings: MuonClipSettings) -> None:
    """Make ``muonclip`` known to Megatron's optimizer factory, for this one model.

    Megatron's own rule sends every parameter that is not two-dimensional to AdamW, experts stored
    as [e, rows, cols] among them; the override here goes by ``specs``.
    """

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


def _over_zero(
    built: Any, specs: Specs, max_logits: MaxLogits | None, settings: MuonClipSettings
) -> MuonClipChain:
    """``built`` with each of its ``DistributedOptimizer`` turned into a ``DistributedMuonClip``.

    Experts first: their load decides how many dense matrices a rank is given.
    """
    groups = ProcessGroupCollection.use_mpu_process_groups()
    parts = [o for o in built.chained_optimizers if isinstance(o, DistributedOptimizer)]

    def is_expert(part: DistributedOptimizer) -> bool:
        return any(not getattr(b.params[0], "allreduce", True) for b in part.buffers if b.params)

    kind = OffloadedMuonClip if settings.offload_fraction else DistributedMuonClip
    chain = adopt(built, MuonClipChain)
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
            expert_load = adopted.matrix_group.assignment.loads[adopted.matrix_group.exchange.rank]
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
    chain.gather_weights_once()
    return chain


def _gather(load: int, data_group: Any, tensor_group: Any) -> list[int]:
    """FLOPs of its experts of every rank of the dense group, tensor rank fastest."""
    loads: list[Any] = [None] * tensor_group.size()
    dist.all_gather_object(loads, load, group=tensor_group)
    rows: list[Any] = [None] * data_group.size()
    dist.all_gather_object(rows, loads, group=data_group)
    return [value for row in rows for value in row]
