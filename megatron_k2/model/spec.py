"""The decoder as Megatron module specs: the only place that chooses whose modules are used."""

from typing import Any, override

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_mtp_block_spec_for_backend,
    get_mlp_module_spec_for_backend,
)
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_k2.errors import UserError
from megatron_k2.model.attention import MLACoreAttention
from megatron_k2.model.experts import GroupedExperts
from megatron_k2.model.mla import K2SelfAttention
from megatron_k2.model.norm import RMSNorm

DEFAULT_LATENT_NORM_EPSILON = 1e-6


class LocalBackend(LocalSpecProvider):
    """Megatron's own modules, with those that K2 on this path needs from us."""

    @override
    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> Any:
        del rms_norm, for_qk, has_residual
        return RMSNorm

    @override
    def core_attention(self) -> type:
        return MLACoreAttention

    @override
    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        del moe_use_grouped_gemm
        return GroupedExperts


def _backend(config: MLATransformerConfig) -> LocalBackend:
    if config.transformer_impl == "local":
        return LocalBackend()
    raise UserError(
        f"--transformer-impl {config.transformer_impl}: the Transformer Engine modules of this "
        "model are not wired in yet; use --transformer-impl local"
    )


def layer_spec(
    config: MLATransformerConfig, *, is_moe: bool, latent_norm_epsilon: float
) -> ModuleSpec:
    """One decoder layer: MLA, then a SwiGLU or the experts (report section 2.3)."""
    backend = _backend(config)
    column, row, norm = (
        backend.column_parallel_linear(),
        backend.row_parallel_linear(),
        backend.layer_norm(rms_norm=True),
    )
    attention = ModuleSpec(
        module=K2SelfAttention,
        params={
            "attn_mask_type": AttnMaskType.causal,
            "latent_norm_epsilon": latent_norm_epsilon,
        },
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=column,
            linear_q_down_proj=column,
            linear_q_up_proj=column,
            linear_kv_down_proj=column,
            linear_kv_up_proj=column,
            core_attention=backend.core_attention(),
            linear_proj=row,
            q_layernorm=norm,
            kv_layernorm=norm,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=get_mlp_module_spec_for_backend(
                backend=backend,
                num_experts=config.num_moe_experts if is_moe else None,
                moe_grouped_gemm=config.moe_grouped_gemm,
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def moe_layer_pattern(config: MLATransformerConfig) -> list[bool]:
    """For each layer of the whole model, whether it has experts (``moe_layer_freq``)."""
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return [layer % frequency == 0 for layer in range(config.num_layers)]
    if len(frequency) != config.num_layers:
        raise UserError(
            f"--moe-layer-freq names {len(frequency)} layers, --num-layers is {config.num_layers}"
        )
    return [bool(has_experts) for has_experts in frequency]


def decoder_block_spec(
    config: MLATransformerConfig,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    latent_norm_epsilon: float = DEFAULT_LATENT_NORM_EPSILON,
) -> TransformerBlockSubmodules:
    """The layers that this pipeline (and virtual pipeline) stage holds.

    Also what stock ``pretrain_gpt.py`` gets from ``--spec megatron_k2.model.spec block_spec``.
    """
    layers = [
        layer_spec(config, is_moe=is_moe, latent_norm_epsilon=latent_norm_epsilon)
        for is_moe in moe_layer_pattern(config)
    ]
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        here = layout.get_layer_id_list(
            layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank
        )
    else:
        first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
        here = range(
            first, first + get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
        )
    norm = _backend(config).layer_norm(rms_norm=True)
    return TransformerBlockSubmodules(layer_specs=[layers[i] for i in here], layer_norm=norm)


def mtp_block_spec(
    config: MLATransformerConfig,
    vp_stage: int | None = None,
    latent_norm_epsilon: float = DEFAULT_LATENT_NORM_EPSILON,
) -> MultiTokenPredictionBlockSubmodules | None:
    """Multi-token prediction layers (K2 has none; DeepSeek-V3 style when ``mtp_num_layers``)."""
    if not config.mtp_num_layers:
        return None
    last = layer_spec(
        config,
        is_moe=moe_layer_pattern(config)[-1],
        latent_norm_epsilon=latent_norm_epsilon,
    )
    return get_gpt_mtp_block_spec_for_backend(config, last, _backend(config), vp_stage=vp_stage)


def block_spec(model_config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The ``--spec`` seam of Megatron's training: takes its ``GPTModelConfig``."""
    return decoder_block_spec(model_config.transformer, vp_stage=vp_stage)
