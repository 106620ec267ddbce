"""The decoder as Megatron module specs: the only place that chooses whose modules are used."""

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_mtp_block_spec_for_backend,
    get_mlp_module_spec_for_backend,
)
from megatron.core.process_groups_config import ProcessGroupCollection
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
from megatron_k2.host.repairs import require_transformer_engine
from megatron_k2.model.lora.settings import LoraSettings
from megatron_k2.model.lora.spec import with_adapters
from megatron_k2.model.spec_local import LocalBackend

DEFAULT_LATENT_NORM_EPSILON = 1e-6


def _backend(config: MLATransformerConfig, lora: LoraSettings | None) -> Any:
    """A ``Backend`` that is also Megatron's ``BackendSpecProvider``."""
    if config.transformer_impl == "local":
        return LocalBackend()
    if config.transformer_impl == "transformer_engine":
        require_transformer_engine()
        from megatron_k2.model.te_spec import AdaptedTEBackend, TEBackend

        return TEBackend() if lora is None else AdaptedTEBackend()
    raise UserError(
        f"--transformer-impl {config.transformer_impl}: expected local or transformer_engine"
    )


def layer_spec(
    config: MLATransformerConfig,
    *,
    is_moe: bool,
    latent_norm_epsilon: float,
    lora: LoraSettings | None = None,
) -> ModuleSpec:
    """One decoder layer: MLA, then a SwiGLU or the experts (report section 2.3)."""
    backend = _backend(config, lora)
    attention = ModuleSpec(
        module=backend.latent_attention,
        params={
            "attn_mask_type": AttnMaskType.causal,
            "latent_norm_epsilon": latent_norm_epsilon,
        },
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=backend.column_parallel_linear(),
            linear_q_down_proj=backend.down_projection(),
            linear_q_up_proj=backend.up_projection(),
            linear_kv_down_proj=backend.down_projection(),
            linear_kv_up_proj=backend.up_projection(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=backend.latent_norm(),
            kv_layernorm=backend.latent_norm(),
        ),
    )
    spec = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.layer_norm(rms_norm=True, has_residual=True),
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=backend.pre_mlp_norm(is_moe=is_moe),
            mlp=get_mlp_module_spec_for_backend(
                backend=backend,
                num_experts=config.num_moe_experts if is_moe else None,
                moe_grouped_gemm=config.moe_grouped_gemm,
                use_te_activation_func=config.use_te_activation_func,
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=backend.checkpoint_names(is_moe=is_moe),
        ),
    )
    return spec if lora is None else with_adapters(spec, lora)


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
    lora: LoraSettings | None = None,
) -> TransformerBlockSubmodules:
    """The layers that this pipeline (and virtual pipeline) stage holds."""
    layers = [
        layer_spec(config, is_moe=is_moe, latent_norm_epsilon=latent_norm_epsilon, lora=lora)
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
    norm = _backend(config, lora).layer_norm(rms_norm=True)
    return TransformerBlockSubmodules(layer_specs=[layers[i] for i in here], layer_norm=norm)


def mtp_block_spec(
    config: MLATransformerConfig,
    vp_stage: int | None = None,
    latent_norm_epsilon: float = DEFAULT_LATENT_NORM_EPSILON,
    lora: LoraSettings | None = None,
) -> MultiTokenPredictionBlockSubmodules | None:
    """Multi-token prediction layers (K2 has none; DeepSeek-V3 style when ``mtp_num_layers``)."""
    if not config.mtp_num_layers:
        return None
    last = layer_spec(
        config,
        is_moe=moe_layer_pattern(config)[-1],
        latent_norm_epsilon=latent_norm_epsilon,
        lora=lora,
    )
    backend = _backend(config, lora)
    return get_gpt_mtp_block_spec_for_backend(config, last, backend, vp_stage=vp_stage)


def block_spec(model_config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """``--spec megatron_k2.model.spec block_spec``: called by Megatron with its model config."""
    return decoder_block_spec(model_config.transformer, vp_stage=vp_stage)


class NumberedLayer(TransformerLayer):
    """A decoder layer that is dense or has experts by its number, and so is one spec for all.

    For programs that take ``--spec``'s object as the layers' spec without calling it
    (``gpt_builders.py`` of Megatron's repository): they know no pattern of layers.
    """

    def __init__(
        self,
        config: MLATransformerConfig,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
        **rest: Any,
    ) -> None:
        stage = pg_collection.pp.rank() if pg_collection is not None else None
        first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=stage)
        own = layer_spec(
            config,
            is_moe=moe_layer_pattern(config)[first + layer_number - 1],
            latent_norm_epsilon=DEFAULT_LATENT_NORM_EPSILON,
        )
        super().__init__(
            config,
            own.submodules,
            layer_number,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
            **rest,
        )


numbered_layer = ModuleSpec(module=NumberedLayer)
"""``--spec megatron_k2.model.spec numbered_layer``; the final norm is Megatron's choice."""
