"""Multi-head latent attention: the modules as the spec names them, whole down-projections."""

import functools
from typing import Any, override

import torch
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttention,
    MLASelfAttentionSubmodules,
)
from torch import Tensor

from megatron_k2.model.linear import ReplicatedLinear
from megatron_k2.model.lora.linears import AdaptedReplicatedLinear
from megatron_k2.model.lora.settings import LoraSettings


class LatentAttention(MLASelfAttention):
    """Megatron's MLA with the modules as the spec names them, and K2's latent norm epsilon."""

    def __init__(self, *args: Any, latent_norm_epsilon: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("q", "kv"):
            norm = getattr(self, f"{name}_layernorm", None)
            if isinstance(norm, IdentityOp):  # fused into the projection that follows it
                norm = getattr(self, f"linear_{name}_up_proj")
            if norm is not None:
                norm.eps = latent_norm_epsilon

    @override
    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        """The classes as the spec names them.

        Upstream insists on a norm fused into ``linear_q_proj`` where the query has no latent;
        the published models (Moonlight, DeepSeek-V2-Lite) have no norm there.
        """
        return {
            "linear_q_proj": submodules.linear_q_proj,
            "linear_q_up_proj": submodules.linear_q_up_proj,
            "linear_kv_up_proj": submodules.linear_kv_up_proj,
            "q_layernorm": submodules.q_layernorm,
            "kv_layernorm": submodules.kv_layernorm,
        }

    @override
    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        q_compressed, kv_combined = super()._qkv_down_projection(hidden_states)
        if self.pg_collection.tp.size() == 1 or self.config.sequence_parallel:
            return q_compressed, kv_combined
        # Without sequence parallelism nothing downstream sums the rotary key's gradient over the
        # ranks' heads; the latent's is summed by the column-parallel up-projection.
        latent, k_pos_emb = torch.split(
            kv_combined, [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim], dim=-1
        )
        k_pos_emb = copy_to_tensor_model_parallel_region(k_pos_emb, group=self.pg_collection.tp)
        return q_compressed, torch.cat([latent, k_pos_emb], dim=-1)

    @override
    def _run_core_attention(self, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Any:
        """Upstream's, with the rows of padding at zero: what TE leaves there is its own affair."""
        output = super()._run_core_attention(*args, packed_seq_params=packed_seq_params, **kwargs)
        is_padding = getattr(packed_seq_params, "is_padding", None)
        if is_padding is None:
            return output
        return output.masked_fill(is_padding.view(-1, *[1] * (output.dim() - 1)), 0)


class K2SelfAttention(LatentAttention):
    """The local path's MLA, with replicated q and kv down-projections.

    Upstream's local path shards the down-projections by column and gathers their output. The
    gather's backward pass only splits, but each tensor-parallel rank uses the shared rotary key
    for its own heads alone, so the last ``qk_pos_emb_head_dim`` rows of the kv down-projection get
    one rank's share of their gradient (``multi_latent_attention.py:739``, 0.19.2;
    ``tests/host/test_upstream_mla_gradients.py`` shows it). Here every rank holds them whole,
    as Transformer Engine's "duplicated" mode does.
    """

    def __init__(self, *args: Any, lora: LoraSettings | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        rows = {"linear_kv_down_proj": config.kv_lora_rank + config.qk_pos_emb_head_dim}
        if config.q_lora_rank is not None:
            rows["linear_q_down_proj"] = config.q_lora_rank
        for name in sorted(rows, reverse=True):  # the query's first, in the order of the model
            setattr(self, name, self._replicated(name, rows[name], lora))
        self._positions: Tensor | None = None
        self.rotary_pos_emb.register_forward_hook(self._at_positions)

    @override
    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Any = None,
        position_ids: Any = None,
        packed_seq_params: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Upstream's, with rows at the positions that the pack gives them."""
        self._positions = getattr(packed_seq_params, "positions", None)
        return super().get_query_key_value_tensors(
            hidden_states, key_value_states, position_ids, packed_seq_params, *args, **kwargs
        )

    def _at_positions(self, _module: Any, _given: Any, angles: Any) -> Any:
        """A row of angles for each of the pack's, which upstream takes as they are.

        ``rope_utils._apply_rotary_pos_emb_thd``, 0.19.2: as many angles as rows are one each.
        """
        if self._positions is None:
            return angles
        if isinstance(angles, tuple):  # YaRN's, with its factor
            return (angles[0].index_select(0, self._positions), *angles[1:])
        return angles.index_select(0, self._positions)

    @override
    def _run_core_attention(self, *args: Any, **kwargs: Any) -> Any:
        """The core takes values of any width and leaves padding at zero: upstream would widen."""
        return self.core_attention(*args, **kwargs)

    def _replicated(
        self, name: str, output_size: int, lora: LoraSettings | None
    ) -> ReplicatedLinear:
        kind: Any = ReplicatedLinear
        if lora is not None and name in lora.targets:
            kind = functools.partial(AdaptedReplicatedLinear, lora=lora)
        linear: ReplicatedLinear = kind(
            self.config.hidden_size,
            output_size,
            config=self.config,
            init_method=self.config.init_method,
        )
        return linear
