"""MuonClip without ZeRO: every data-parallel rank holds whole shards and all of the state.

Each matrix is still orthogonalised only once, at its home, which sends the result to the other
ranks. Megatron's registry (``muonclip.build``) builds it.
"""

import itertools
from collections.abc import Callable
from typing import Any, override

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_k2.optimizer.momentum import directions, momentum_of
from megatron_k2.optimizer.muon import apply_updates, rms_match_scale
from megatron_k2.optimizer.param_groups import MatrixSpec
from megatron_k2.optimizer.qk_clip.apply import row_scales
from megatron_k2.optimizer.qk_clip.max_logits import MaxLogits
from megatron_k2.optimizer.settings import MuonClipSettings
from megatron_k2.optimizer.sharded.bucket_size import MIN_BUCKET_ELEMENTS
from megatron_k2.optimizer.sharded.matrix_group import MatrixGroup, MatrixParameter


class MuonClip(torch.optim.Optimizer):
    """Muon on the matrices it is given, then QK-Clip if they include the attention's.

    Megatron chains one instance for dense parameters and, under expert parallelism, one for
    experts. State: ``momentum_buffer`` of each parameter, its shape, fp32.

    Attributes:
        grad_factor: of this step's clip, see ``muon.update_momenta``.
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
        self.settings, self._max_logits = settings, max_logits
        self.grad_factor: float | Tensor | None = None
        self._data_cp_group = pg_collection.dp_cp
        names = {p: n for chunk in model_chunks for n, p in chunk.named_parameters()}
        # Until Megatron swaps in fp32 masters, these are the model's own parameters.
        own = [p for group in self.param_groups for p in group["params"]]
        is_expert = any(not getattr(p, "allreduce", True) for p in own)
        data_group = pg_collection.expt_dp if is_expert else pg_collection.dp_cp
        before = itertools.accumulate((p.numel() for p in own), initial=0)
        self.matrix_group = MatrixGroup(
            [
                MatrixParameter(
                    names[p],
                    p,
                    specs[p],
                    ((0, p.numel()),) * data_group.size(),
                    first // MIN_BUCKET_ELEMENTS,
                )
                for p, first in zip(own, before, strict=False)
            ],
            data_group,
            pg_collection.expt_tp if is_expert else pg_collection.tp,
            settings,
            is_data_replicated=True,
        )
        clipped = {param for param, _ in row_scales(max_logits, settings)}
        self._has_attention = any(p in clipped for p in own)

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step on this rank's fp32 parameters; collective over tensor and data parallel."""
        if self._has_attention:
            self._max_logits.start(self._data_cp_group)
        self._group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        self.matrix_group.run(self._directions, self._apply)
        if self._has_attention:
            self._max_logits.finish()
            # On the fp32 weights, before Megatron casts them to the model's dtype.
            for param, factors in row_scales(self._max_logits, self.settings):
                _main(param).mul_(factors.view(-1, *[1] * (param.ndim - 1)))

    def _directions(self, params: list[torch.nn.Parameter]) -> dict[torch.nn.Parameter, Tensor]:
        mains = [_main(param) for param in params]
        made = directions(self, mains, self.settings, self.grad_factor)
        return {p: part.flatten() for p, part in zip(params, made, strict=True)}

    def _apply(self, updates: dict[torch.nn.Parameter, Tensor]) -> None:
        """Weights of one parameter group and one RMS scale together."""
        alike: dict[tuple[float, float, float], tuple[list[Tensor], list[Tensor]]] = {}
        for param, update in updates.items():
            main = _main(param)
            group = self._group_of[id(main)]
            rows, cols = self.matrix_group.block_shape(param)
            scale = rms_match_scale(rows, cols, self.settings.scale_factor)
            key = (group["lr"], group["weight_decay"], scale)
            weights, values = alike.setdefault(key, ([], []))
            weights.append(main)
            values.append(update.view(main.shape))
        for (lr, weight_decay, scale), (weights, values) in alike.items():
            apply_updates(weights, values, lr, weight_decay, scale)

    def init_state(self) -> None:
        """Zero momentum for every parameter, as a checkpoint load expects."""
        for group in self.param_groups:
            for param in group["params"]:
                momentum_of(self, param)


def _main(param: Tensor) -> Any:
    """The fp32 master of a bf16 parameter, or the fp32 parameter itself."""
    return getattr(param, "main_param", param)
