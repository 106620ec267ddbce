"""MuonClip on Megatron's ``DistributedOptimizer``: ZeRO-1 shards, matrices whole only at home.

The host keeps its flat, unpadded shards of master weights and momentum, its gradient
reduce-scatter and parameter all-gather; ``step_with_ready_grads`` is the one step that differs.
There, after unscaling, clipping and the skip on overflow, and before AdamW and the cast to bf16:

1. the MAX all-reduce of the heads' largest logits is started;
2. momentum is updated on the fp32 shards;
3. the matrices are exchanged, orthogonalised at their homes, and returned (``exchange.py``);
4. W <- W (1 - ηλ) - η · 0.2 sqrt(max(n, m)) · U Vᵀ on the shards;
5. QK-Clip scales rows of the fp32 shards, so that bf16 is round(master) on every rank.

State of a Muon parameter: ``momentum_buffer``. There is no ``exp_avg_sq``. Checkpoints are by
parameter name (``checkpoint_by_name.py``), through ``chain.MuonClipChain``.
"""

from typing import Any, override

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_k2.errors import UserError
from megatron_k2.optimizer.adopt import adopt
from megatron_k2.optimizer.momentum import directions, momentum_of
from megatron_k2.optimizer.muon import apply_update, rms_match_scale
from megatron_k2.optimizer.param_groups import MatrixSpec
from megatron_k2.optimizer.qk_clip.apply import row_scales
from megatron_k2.optimizer.qk_clip.factors import scale_rows_
from megatron_k2.optimizer.qk_clip.max_logits import MaxLogits
from megatron_k2.optimizer.settings import MuonClipSettings
from megatron_k2.optimizer.sharded.bucket_size import default_bucket_size
from megatron_k2.optimizer.sharded.checkpoint_by_name import sharded_pieces, sharded_scalars
from megatron_k2.optimizer.sharded.homes import shard_pieces
from megatron_k2.optimizer.sharded.matrix_group import MatrixGroup, MatrixParameter


class DistributedMuonClip(DistributedOptimizer):
    """Made of a finished ``DistributedOptimizer`` over AdamW by ``adopt``."""

    settings: MuonClipSettings
    _max_logits: MaxLogits | None
    matrix_group: MatrixGroup
    num_steps: int
    """Optimizer steps taken, over all runs."""
    grad_factor: float | Tensor | None = None
    """What this step's clip scales gradients by, see ``muon.update_momenta``."""

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
            seed_loads: see ``homes.assign_homes``.
        """
        if optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
            raise ValueError(
                "MuonClip keeps its own fp32 master shards; drop --use-precision-aware-optimizer"
            )
        if any(param.ndim > 2 for param in specs):
            raise UserError(
                "experts stored as one [e, rows, cols] parameter cannot be saved from ZeRO shards; "
                "drop --moe-single-grouped-weight, or --use-distributed-optimizer"
            )
        adopted = adopt(optimizer, cls)
        adopted.settings, adopted._max_logits = settings, max_logits
        adopted._data_cp_group = data_cp_group
        matrices = adopted._matrices(specs)
        adopted.matrix_group = MatrixGroup(
            matrices, adopted.data_parallel_group, tensor_group, settings, seed_loads=seed_loads
        )
        adopted._main_of = {
            m.param: adopted._shard(m.param)
            for m in matrices
            if m.param in adopted.model_param_group_index_map
        }
        adopted.num_steps = 0
        return adopted

    def _matrices(self, specs: dict[torch.nn.Parameter, MatrixSpec]) -> list[MatrixParameter]:
        """This optimizer's Muon parameters in buffer order, with every rank's cut of each.

        What is exchanged together is a bucket of the host's, or part of one: behind the first
        pipeline stage, and without ``--overlap-grad-reduce``, the host makes one bucket of a whole
        model chunk, and a step would then hold all its directions at once.
        """
        names = self._names()
        size = self.data_parallel_group.size()
        most = default_bucket_size(size)
        found: list[MatrixParameter] = []
        number = 0
        for buffer in self.buffers:
            current, filled = -1, 0
            for param, (start, end, bucket_id) in buffer.param_index_map.items():
                if bucket_id != current or filled >= most:
                    current, filled, number = bucket_id, 0, number + 1
                filled += end - start
                if param in specs:
                    bucket = buffer.buckets[bucket_id]
                    pieces = shard_pieces(start, end, bucket.offset, bucket.grad_data.numel(), size)
                    found.append(MatrixParameter(names[param], param, specs[param], pieces, number))
        return found

    def _names(self) -> dict[torch.nn.Parameter, str]:
        """A name of each parameter that is unique on this rank (virtual stages repeat theirs)."""
        return {
            param: f"{number}.{name}"
            for number, chunk in enumerate(self.model_chunks)
            for name, param in chunk.named_parameters()
        }

    def _shard(self, param: torch.nn.Parameter) -> tuple[Tensor, dict[str, Any]]:
        """This rank's flat fp32 shard of ``param``, and its parameter group."""
        group_index, order = self.model_param_group_index_map[param]
        group = self.optimizer.param_groups[group_index]
        return group["params"][order], group

    @override
    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        if self.is_stub_optimizer:
            return super().step_with_ready_grads()
        if self._max_logits is not None:
            self._max_logits.start(self._data_cp_group)
        self.num_steps += 1
        self.matrix_group.run(self._directions, self._apply)
        if self._max_logits is not None:
            self._max_logits.finish()
            self._qk_clip(self._max_logits)
        return super().step_with_ready_grads()

    def _directions(self, params: list[torch.nn.Parameter]) -> dict[torch.nn.Parameter, Tensor]:
        mains = [self._main_of[param][0] for param in params]
        made = directions(self.optimizer, mains, self.settings, self.grad_factor)
        for main in mains:
            main.grad = None  # AdamW, which the host runs next, passes over it
        return dict(zip(params, made, strict=True))

    def _apply(self, updates: dict[torch.nn.Parameter, Tensor]) -> None:
        for param, update in updates.items():
            main, group = self._main_of[param]
            rows, cols = self.matrix_group.block_shape(param)
            scale = rms_match_scale(rows, cols, self.settings.scale_factor)
            apply_update(main, update, group["lr"], group["weight_decay"], scale)

    def _qk_clip(self, max_logits: MaxLogits) -> None:
        for param, scale in row_scales(max_logits, self.settings):
            if param in self.model_param_group_index_map:
                piece = self._get_model_param_range_map(param)["param"]
                main, _ = self._shard(param)
                row_length = param.shape[1] if param.ndim == 2 else 1
                scale_rows_(main, scale, row_length, piece.start, piece.end)

    def muon_shards(self) -> list[Tensor]:
        """This rank's flat fp32 shards of Muon's matrices."""
        return [main for main, _ in self._main_of.values()]

    def state_by_name(self, entries: dict[torch.nn.Parameter, Any]) -> dict[str, Any]:
        """Every tensor of this optimizer's state, described by parameter.

        Args:
            entries: the model's own sharded description of each parameter with a piece here.

        Returns:
            Parameter name -> state -> ``ShardedTensor`` views of the live state, so that loading
            fills it in place.
        """
        for param in self.model_param_group_index_map:
            self._allocate_state(param)
        self.matrix_group.share_peaks()
        names = self._names()
        described: dict[str, Any] = {}
        for param, entry in entries.items():
            piece = self._get_model_param_range_map(param)["param"]
            main, _ = self._shard(param)
            states = {
                name: sharded_pieces(entry, param.shape, (piece.start, piece.end), values, name)
                for name, values in self._named_state(param, main)
            }
            if param in self._main_of and self.matrix_group.peaks is not None:
                values = self.matrix_group.peaks_of(param)
                rank = self.data_parallel_group.rank()
                first = next(r for r, (a, b) in enumerate(self.matrix_group.pieces(param)) if b > a)
                states["muon_peak"] = [sharded_scalars(entry, values, "muon_peak", rank - first)]
            described[names[param]] = states
        return described

    def load_state_by_name(self, loaded: dict[str, Any], num_steps: int) -> None:
        """Take what ``state_by_name`` described and a checkpoint filled."""
        self.num_steps = num_steps
        names = self._names()
        with torch.no_grad():
            for param in self.model_param_group_index_map:
                main, _ = self._shard(param)
                boxes = loaded[names[param]]
                for name, values in self._named_state(param, main):
                    values.copy_(torch.cat([box.reshape(-1) for box in boxes[name]]))
                if "muon_peak" in boxes:
                    self.matrix_group.peaks_of(param).copy_(boxes["muon_peak"][0].reshape(-1))
        if not isinstance(self.optimizer, torch.optim.AdamW):
            # Transformer Engine's FusedAdam counts in the group, which has no count before its
            # first step; without one the bias corrections would start again.
            for group in self.optimizer.param_groups:
                group["step"] = num_steps
        for state in self.optimizer.state.values():
            if "step" in state:  # torch's AdamW
                state["step"].fill_(num_steps)

    def _named_state(self, param: torch.nn.Parameter, main: Tensor) -> list[tuple[str, Tensor]]:
        """(name in a checkpoint, flat values on this rank)."""
        state = self.optimizer.state[main]
        if param in self._main_of:
            named = [("momentum_buffer", state["momentum_buffer"])]
        else:
            named = [(name, state[name]) for name in ("exp_avg", "exp_avg_sq")]
        if param.dtype != torch.float32:  # otherwise the weight itself is the master
            named.append(("fp32_param", main))
        return named

    def _allocate_state(self, param: torch.nn.Parameter) -> None:
        """Zero state for the shard of ``param``, if it has none yet."""
        main, _ = self._shard(param)
        if param in self._main_of:
            momentum_of(self.optimizer, main)
            return
        state = self.optimizer.state[main]
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(main)
        if isinstance(self.optimizer, torch.optim.AdamW) and "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
