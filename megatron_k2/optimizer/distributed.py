"""MuonClip on Megatron's ``DistributedOptimizer``: ZeRO-1 shards, matrices whole only at home.

The host keeps its flat, unpadded shards of master weights and momentum, its gradient
reduce-scatter and parameter all-gather; ``step_with_ready_grads`` is the one step that differs.
There, after unscaling, clipping and the skip on overflow, and before AdamW and the cast to bf16:

1. the MAX all-reduce of the heads' largest logits is started;
2. momentum is updated on the fp32 shards;
3. the matrices are exchanged, orthogonalised at their homes, and returned (``exchange.py``);
4. W <- W (1 - ηλ) - η · 0.2 sqrt(max(n, m)) · U Vᵀ on the shards;
5. QK-Clip scales rows of the fp32 shards, so that bf16 is round(master) on every rank.

State of a Muon parameter: ``exp_avg`` (the momentum; upstream's name, so that its checkpoint
formats carry it) and ``step``. There is no ``exp_avg_sq``.
"""

from typing import Any, override

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_k2.optimizer.clip_step import row_scales
from megatron_k2.optimizer.domain import MatrixParameter, MuonClipSettings, MuonDomain
from megatron_k2.optimizer.max_logits import MaxLogits
from megatron_k2.optimizer.muon import apply_update, rms_match_scale, update_momentum
from megatron_k2.optimizer.param_groups import MatrixSpec
from megatron_k2.optimizer.qk_clip import scale_rows_


class DistributedMuonClip(DistributedOptimizer):
    """Made of a finished ``DistributedOptimizer`` over AdamW by ``adopt``."""

    _settings: MuonClipSettings
    _max_logits: MaxLogits | None
    domain: MuonDomain

    @classmethod
    def adopt(
        cls,
        optimizer: DistributedOptimizer,
        specs: dict[torch.nn.Parameter, MatrixSpec],
        settings: MuonClipSettings,
        max_logits: MaxLogits | None,
        *,
        tensor_group: dist.ProcessGroup,
        data_cp_group: dist.ProcessGroup,
        seed_loads: list[int] | None = None,
    ) -> "DistributedMuonClip":
        """Turn ``optimizer`` into this class.

        Args:
            optimizer: as the host's factory built it, in ``adam`` mode.
            specs: every Muon matrix of the model (``param_groups.muon_matrices``).
            settings: see there.
            max_logits: for the optimizer that holds the attention; None for the experts' one.
            tensor_group: that this optimizer's parameters are split over.
            data_cp_group: the ranks that see other tokens of the same batch.
            seed_loads: see ``plan.make_plan``.
        """
        if optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
            raise ValueError(
                "MuonClip keeps its own fp32 master shards; drop --use-precision-aware-optimizer"
            )
        optimizer.__class__ = cls
        adopted: DistributedMuonClip = optimizer
        adopted._settings, adopted._max_logits = settings, max_logits
        adopted._data_cp_group = data_cp_group
        matrices = adopted._matrices(specs)
        adopted.domain = MuonDomain(
            matrices, adopted.data_parallel_group, tensor_group, settings, seed_loads=seed_loads
        )
        adopted._main_of = {
            m.param: adopted._shard(m.param)
            for m in matrices
            if m.param in adopted.model_param_group_index_map
        }
        adopted._muon_mains = {id(main) for main, _ in adopted._main_of.values()}
        return adopted

    def _matrices(self, specs: dict[torch.nn.Parameter, MatrixSpec]) -> list[MatrixParameter]:
        """This optimizer's Muon parameters in buffer order, with every rank's cut of each."""
        names = {p: n for chunk in self.model_chunks for n, p in chunk.named_parameters()}
        size = self.data_parallel_group.size()
        found: list[MatrixParameter] = []
        first_bucket = 0
        for buffer in self.buffers:
            for param, (start, end, bucket_id) in buffer.param_index_map.items():
                if param in specs:
                    bucket = buffer.buckets[bucket_id]
                    pieces = _cuts(start, end, bucket.offset, bucket.grad_data.numel(), size)
                    found.append(
                        MatrixParameter(
                            names[param], param, specs[param], pieces, first_bucket + bucket_id
                        )
                    )
            first_bucket += len(buffer.buckets)
        return found

    def _shard(self, param: torch.nn.Parameter) -> tuple[Tensor, dict[str, Any]]:
        """This rank's flat fp32 shard of ``param``, and its parameter group."""
        group_index, order = self.model_param_group_index_map[param]
        group = self.optimizer.param_groups[group_index]
        return group["params"][order], group

    def _muon_state(self, main: Tensor) -> dict[str, Tensor]:
        state = self.optimizer.state[main]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(main)
            state["step"] = torch.zeros((), dtype=torch.float32)
        state.pop("exp_avg_sq", None)
        return state

    @override
    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        if self.is_stub_optimizer:
            return super().step_with_ready_grads()
        if self._max_logits is not None:
            self._max_logits.start(self._data_cp_group)
        self._muon_step()
        if self._max_logits is not None:
            self._max_logits.finish()
            self._qk_clip(self._max_logits)
        return super().step_with_ready_grads()

    def _muon_step(self) -> None:
        settings = self._settings
        directions = {}
        for param, (main, _) in self._main_of.items():
            state = self._muon_state(main)
            state["step"] += 1
            directions[param] = update_momentum(
                state["exp_avg"], main.grad, settings.momentum, settings.nesterov
            )
            main.grad = None  # AdamW, which the host runs next, passes over it
        for param, update in self.domain.run(directions).items():
            main, group = self._main_of[param]
            rows, cols = self.domain.block_shape(param)
            scale = rms_match_scale(rows, cols, settings.scale_factor)
            apply_update(main, update.to(main.dtype), group["lr"], group["weight_decay"], scale)

    def _qk_clip(self, max_logits: MaxLogits) -> None:
        for param, scale in row_scales(max_logits, self._settings):
            if param in self._main_of:
                piece = self._get_model_param_range_map(param)["param"]
                main, _ = self._main_of[param]
                scale_rows_(main, scale, param.shape[1], piece.start, piece.end)


def _cuts(
    start: int, end: int, bucket_start: int, bucket_numel: int, num_ranks: int
) -> tuple[tuple[int, int], ...]:
    """[from, to) of a parameter at buffer positions [start, end) that each rank's shard holds."""
    shard = bucket_numel // num_ranks
    cuts = []
    for rank in range(num_ranks):
        low = max(start, bucket_start + rank * shard)
        high = min(end, bucket_start + (rank + 1) * shard)
        cuts.append((low - start, high - start) if high > low else (0, 0))
    return tuple(cuts)
