"""MuonClip without ZeRO, and the door through which Megatron builds either form.

Kimi K2 report (arXiv:2507.20534), Algorithm 1: a Muon step on every matrix, then QK-Clip on the
heads whose largest logit exceeded τ. AdamW takes the rest.

- With ``--use-distributed-optimizer``: ``distributed.DistributedMuonClip`` adopts the optimizers
  that Megatron's factory built in ``adam`` mode.
- Without: every data-parallel rank holds whole shards and all of the state; ``MuonClip`` below is
  registered in Megatron's optimizer registry. Each matrix is still orthogonalised only once, at
  its home, which sends the result to the other ranks.
"""

from collections.abc import Callable
from typing import Any, override

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.emerging_optimizers import (
    _EMERGING_OPTIMIZERS,
    EmergingOptimizerEntry,
)
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_k2.optimizer.chain import MuonClipChain
from megatron_k2.optimizer.clip_step import row_scales
from megatron_k2.optimizer.distributed import DistributedMuonClip
from megatron_k2.optimizer.domain import MatrixParameter, MuonClipSettings, MuonDomain
from megatron_k2.optimizer.max_logits import MaxLogits
from megatron_k2.optimizer.muon import apply_update, rms_match_scale, update_momentum
from megatron_k2.optimizer.param_groups import MatrixSpec, muon_matrices


class MuonClip(torch.optim.Optimizer):
    """Muon on the matrices it is given, then QK-Clip if they include the attention's.

    Megatron chains one instance for dense parameters and, under expert parallelism, one for
    experts. State: ``momentum_buffer`` of each parameter, its shape, fp32.
    """

    def __init__(
        self,
        params: Any,
        *,
        model_chunks: list[torch.nn.Module],
        specs: dict[torch.nn.Parameter, MatrixSpec],
        pg_collection: ProcessGroupCollection,
        max_logits: MaxLogits,
        settings: MuonClipSettings,
        lr: float,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})
        self._settings, self._max_logits = settings, max_logits
        self._data_cp_group = pg_collection.dp_cp
        names = {p: n for chunk in model_chunks for n, p in chunk.named_parameters()}
        # Until Megatron swaps in fp32 masters, these are the model's own parameters.
        own = [p for group in self.param_groups for p in group["params"]]
        is_expert = any(not getattr(p, "allreduce", True) for p in own)
        data_group = pg_collection.expt_dp if is_expert else pg_collection.dp_cp
        self._domain = MuonDomain(
            [
                MatrixParameter(names[p], p, specs[p], ((0, p.numel()),) * data_group.size(), 0)
                for p in own
            ],
            data_group,
            pg_collection.expt_tp if is_expert else pg_collection.tp,
            settings,
            is_data_replicated=True,
        )
        attention = {m.linear_kv_up_proj.weight for m in max_logits.attentions}
        self._has_attention = any(p in attention for p in own)

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step on this rank's fp32 parameters; collective over tensor and data parallel."""
        if self._has_attention:
            self._max_logits.start(self._data_cp_group)
        settings = self._settings
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        directions = {}
        for matrix in self._domain.matrices:
            main = _main(matrix.param)
            direction = update_momentum(
                self._momentum_of(main), main.grad, settings.momentum, settings.nesterov
            )
            directions[matrix.param] = direction.flatten()
        for param, update in self._domain.run(directions).items():
            main = _main(param)
            group = groups[id(main)]
            rows, cols = self._domain.block_shape(param)
            scale = rms_match_scale(rows, cols, settings.scale_factor)
            update = update.view(main.shape).to(main.dtype)
            apply_update(main, update, group["lr"], group["weight_decay"], scale)
        if self._has_attention:
            self._max_logits.finish()
            # On the fp32 weights, before Megatron casts them to the model's dtype.
            for param, factors in row_scales(self._max_logits, settings):
                _main(param).mul_(factors[:, None])

    def init_state(self) -> None:
        """Zero momentum for every parameter, as a checkpoint load expects."""
        for group in self.param_groups:
            for param in group["params"]:
                self._momentum_of(param)

    def _momentum_of(self, main: Tensor) -> Tensor:
        state = self.state[main]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(main)
        return state["momentum_buffer"]


def _main(param: Tensor) -> Any:
    """The fp32 master of a bf16 parameter, or the fp32 parameter itself."""
    return getattr(param, "main_param", param)


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


def adopt_distributed(
    optimizer: Any,
    model_chunks: list[torch.nn.Module],
    max_logits: MaxLogits,
    settings: MuonClipSettings,
) -> None:
    """Turn every ``DistributedOptimizer`` in ``optimizer`` into a ``DistributedMuonClip``.

    Experts first: their load decides how many dense matrices a rank is given.
    """
    groups = ProcessGroupCollection.use_mpu_process_groups()
    specs = muon_matrices(model_chunks, settings.matrices)
    parts = [o for o in optimizer.chained_optimizers if isinstance(o, DistributedOptimizer)]

    def is_expert(part: DistributedOptimizer) -> bool:
        return any(not getattr(b.params[0], "allreduce", True) for b in part.buffers if b.params)

    MuonClipChain.adopt(optimizer)
    expert_load = 0
    for part in sorted(parts, key=is_expert, reverse=True):
        if part.is_stub_optimizer:
            continue
        if is_expert(part):
            adopted = DistributedMuonClip.adopt(
                part,
                specs,
                settings,
                None,
                tensor_group=groups.expt_tp,
                data_cp_group=groups.dp_cp,
            )
            expert_load = adopted.domain.plan.loads[adopted.domain.exchange.rank]
        else:
            DistributedMuonClip.adopt(
                part,
                specs,
                settings,
                max_logits,
                tensor_group=groups.tp,
                data_cp_group=groups.dp_cp,
                seed_loads=_gather(expert_load, part.data_parallel_group, groups.tp),
            )


def _gather(load: int, data_group: Any, tensor_group: Any) -> list[int]:
    """Every domain rank's expert load, tensor rank fastest."""
    loads: list[Any] = [None] * tensor_group.size()
    torch.distributed.all_gather_object(loads, load, group=tensor_group)
    rows: list[Any] = [None] * data_group.size()
    torch.distributed.all_gather_object(rows, loads, group=data_group)
    return [value for row in rows for value in row]
