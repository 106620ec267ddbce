"""MuonClip as a Megatron optimizer: ``--optimizer muonclip``.

Kimi K2 report (arXiv:2507.20534), Algorithm 1: a Muon step on every matrix, then QK-Clip on the
heads whose largest logit exceeded τ. AdamW takes the rest, through Megatron's own registry. This is
the plain form: every data-parallel rank holds everything and orthogonalises everything, a
tensor-parallel matrix is gathered and orthogonalised on each of its ranks.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, override

import torch
import torch.distributed as dist
from megatron.core.optimizer.emerging_optimizers import (
    _EMERGING_OPTIMIZERS,
    EmergingOptimizerEntry,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_k2.optimizer.max_logits import MaxLogits
from megatron_k2.optimizer.muon import apply_update, rms_match_scale, update_momentum
from megatron_k2.optimizer.newton_schulz import orthogonalize
from megatron_k2.optimizer.param_groups import MatrixSpec, muon_matrices
from megatron_k2.optimizer.qk_clip import (
    clip_factor,
    mla_key_value_row_scale,
    mla_query_row_scale,
)

MEGATRON_COEFFICIENTS = {"simple": "jordan", "quintic": "quintic", "polar_express": "polar_express"}
"""``--muon-coefficient-type`` -> our table."""


class MuonClip(torch.optim.Optimizer):
    """Muon on the matrices it is given, then QK-Clip if they include the attention's.

    State: ``momentum_buffer`` of each parameter, its shape, fp32.
    """

    def __init__(
        self,
        params: Any,
        *,
        model_chunks: list[torch.nn.Module],
        pg_collection: ProcessGroupCollection,
        max_logits: MaxLogits,
        lr: float,
        momentum: float,
        nesterov: bool,
        coefficients: str,
        steps: int,
        scale_factor: float,
        dtype: torch.dtype,
        qk_clip_threshold: float,
        qk_clip_alpha: float,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})
        self._specs = muon_matrices(model_chunks)
        self._groups = pg_collection
        self._max_logits = max_logits
        self._momentum, self._nesterov = momentum, nesterov
        self._scale_factor = scale_factor
        self._newton_schulz = functools.partial(
            orthogonalize, coefficients=coefficients, steps=steps, dtype=dtype
        )
        self._threshold, self._alpha = qk_clip_threshold, qk_clip_alpha

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step on this rank's fp32 parameters; collective over tensor and data parallel."""
        specs = {_main(param): spec for param, spec in self._specs.items()}
        whole: dict[Tensor, list[Tensor]] = {}
        for param, grad, _ in self._params():
            direction = update_momentum(
                self._momentum_of(param), grad, self._momentum, self._nesterov
            )
            spec = specs[param]
            whole[param] = spec.assemble(_gather(direction, spec, self._tp(spec)))
        updates = self._orthogonalize(whole)
        for param, _, group in self._params():
            spec, matrices = specs[param], updates[param]
            tp = self._tp(spec)
            update = spec.own_part(matrices, tp.rank(), tp.size())
            rows, cols = matrices[0].shape
            scale = rms_match_scale(rows, cols, self._scale_factor)
            apply_update(
                param, update.to(param.dtype), group["lr"], group["weight_decay"], scale=scale
            )
        self._clip(set(whole))

    def init_state(self) -> None:
        """Zero momentum for every parameter, as a checkpoint load expects."""
        for group in self.param_groups:
            for param in group["params"]:
                self._momentum_of(param)

    def _momentum_of(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        return state["momentum_buffer"]

    def _params(self) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    yield param, param.grad, group

    def _tp(self, spec: MatrixSpec) -> dist.ProcessGroup:
        return self._groups.expt_tp if spec.is_expert else self._groups.tp

    def _orthogonalize(self, whole: dict[Tensor, list[Tensor]]) -> dict[Tensor, list[Tensor]]:
        """Newton-Schulz of all matrices, those of one shape in one batch."""
        by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for matrices in whole.values():
            for matrix in matrices:
                by_shape[tuple(matrix.shape)].append(matrix)
        results = {
            shape: iter(self._newton_schulz(torch.stack(matrices)))
            for shape, matrices in by_shape.items()
        }
        return {
            param: [next(results[tuple(matrix.shape)]) for matrix in matrices]
            for param, matrices in whole.items()
        }

    def _clip(self, updated: set[Tensor]) -> None:
        """QK-Clip on the fp32 weights, before Megatron casts them to the model's dtype."""
        attentions = self._max_logits.attentions
        if not attentions or _main(attentions[0].linear_kv_up_proj.weight) not in updated:
            return  # the chained optimizer of the experts: the attention is another's
        max_logits = self._max_logits.take(self._groups.dp_cp)
        for attention, row in zip(attentions, max_logits, strict=True):
            config = attention.config
            gamma = clip_factor(row, self._threshold)
            has_latent = config.q_lora_rank is not None
            query = attention.linear_q_up_proj if has_latent else attention.linear_q_proj
            query_scale = mla_query_row_scale(
                gamma, config.qk_head_dim, config.qk_pos_emb_head_dim, self._alpha
            )
            key_value_scale = mla_key_value_row_scale(
                gamma, config.qk_head_dim, config.v_head_dim, self._alpha
            )
            _main(query.weight).mul_(query_scale[:, None])
            _main(attention.linear_kv_up_proj.weight).mul_(key_value_scale[:, None])


def _main(param: Tensor) -> Tensor:
    """The fp32 master of a bf16 parameter, or the fp32 parameter itself."""
    return getattr(param, "main_param", param)


def _gather(shard: Tensor, spec: MatrixSpec, group: dist.ProcessGroup) -> list[Tensor]:
    if spec.partition_dim < 0 or group.size() == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return shards


def register(max_logits: MaxLogits, dtype: torch.dtype) -> None:
    """Make ``muonclip`` known to Megatron's optimizer factory, for the model of ``max_logits``."""

    def kwargs(
        config: Any, model_chunks: list[Any], pg_collection: ProcessGroupCollection
    ) -> dict[str, Any]:
        transformer = model_chunks[0].config
        return {
            "model_chunks": model_chunks,
            "pg_collection": pg_collection,
            "max_logits": max_logits,
            "lr": config.lr,
            "momentum": config.muon_momentum,
            "nesterov": config.muon_nesterov,
            "coefficients": MEGATRON_COEFFICIENTS[config.muon_coefficient_type],
            "steps": config.muon_num_ns_steps,
            "scale_factor": config.muon_extra_scale_factor,
            "dtype": dtype,
            "qk_clip_threshold": transformer.qk_clip_threshold,
            "qk_clip_alpha": transformer.qk_clip_alpha,
        }

    _EMERGING_OPTIMIZERS["muonclip"] = EmergingOptimizerEntry(
        optimizer_cls=MuonClip,
        init_state_fn=lambda optimizer, config=None: optimizer.init_state(),
        config_to_kwargs=kwargs,
    )
