"""The one function that constructs the model, and the config it is constructed from.

Upstream deprecates ``GPTModel`` in favour of ``HybridModel``; the move is confined to this file.
"""

import contextlib
import functools
from argparse import Namespace
from dataclasses import dataclass
from typing import Any, ClassVar, override

from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from megatron_k2.fp8.storage import store_activations
from megatron_k2.model.lora.model import AdapterGPTModel
from megatron_k2.model.lora.settings import LoraSettings, settings_of
from megatron_k2.model.moe import BalancedFinalize
from megatron_k2.model.padding_rows import keep_padding_out
from megatron_k2.model.spec import decoder_block_spec, mtp_block_spec
from megatron_k2.model.vocabulary import UnpaddedDraws, mask_output_layer


@dataclass(kw_only=True)
class K2ModelConfig(GPTModelConfig):
    """Megatron's model config with what it lacks; its ``vocab_size`` is the padded one."""

    builder: ClassVar[str] = "megatron_k2.model.build.K2ModelBuilder"
    latent_norm_epsilon: float = 1e-6
    """Epsilon of the RMSNorms on q's and kv's latents; the released modeling code has 1e-6."""
    fp8_activation_storage: bool = False
    """Keep two kinds of activations in FP8 for backward, see ``fp8/storage.py``."""
    num_ids: int | None = None
    """Ids of the vocabulary that exist, the others are padding; ``None``: all."""
    lora: LoraSettings | None = None
    """Adapters over frozen weights; ``None``: all of the model trains."""
    packs_documents: bool = False
    """Rows may be padding, marked by their position: see ``model/padding_rows.py``."""


class K2ModelBuilder(GPTModelBuilder):
    """Builds one pipeline stage; wrapping and placement are upstream's."""

    @override
    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        config = self._model_config
        vp_size = config.transformer.virtual_pipeline_model_parallel_size
        if pre_process is None:
            pre_process = is_vp_first_stage(vp_stage=vp_stage, vp_size=vp_size) and (
                is_pp_first_stage(pg_collection.pp)
            )
        if post_process is None:
            post_process = is_vp_last_stage(vp_stage=vp_stage, vp_size=vp_size) and (
                is_pp_last_stage(pg_collection.pp)
            )
        model = build_gpt_model(
            config.transformer,
            vocab_size=config.vocab_size,
            num_ids=config.num_ids,
            max_sequence_length=config.seq_length,
            rotary_base=config.rotary_base,
            latent_norm_epsilon=config.latent_norm_epsilon,
            lora=config.lora,
            pg_collection=pg_collection,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        if isinstance(model, AdapterGPTModel) and config.lora is not None:
            if config.lora.base is not None:
                model.load_base(config.lora.base)
            if config.lora.holds_fp8:
                model.hold_base_in_fp8()
        if config.fp8_activation_storage:
            store_activations(model)
        if config.packs_documents:
            keep_padding_out(model)
        return model


def build_gpt_model(
    config: MLATransformerConfig,
    *,
    vocab_size: int,
    num_ids: int | None = None,
    max_sequence_length: int,
    rotary_base: float,
    latent_norm_epsilon: float = 1e-6,
    lora: LoraSettings | None = None,
    pg_collection: ProcessGroupCollection | None = None,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
) -> GPTModel:
    """One stage of a K2 model.

    Args:
        config: of the transformer.
        vocab_size: rows of embedding and output layer, already padded for tensor parallelism.
        num_ids: of them those that exist, see ``model/vocabulary.py``; ``None``: all.
        max_sequence_length: tokens.
        rotary_base: of the rotary embedding.
        latent_norm_epsilon: of the norms on q's and kv's latents.
        lora: adapters over weights that are frozen then; ``None``: all trains.
        pg_collection: the groups; ``None``: Megatron's global ones.
        pre_process: whether the stage holds the embedding.
        post_process: whether it holds the output layer.
        vp_stage: the virtual stage.
    """
    num_ids = vocab_size if num_ids is None else num_ids
    draws: UnpaddedDraws | None = None
    if num_ids < vocab_size and config.use_cpu_initialization and config.perform_initialization:
        draws = UnpaddedDraws(config, num_ids, vocab_size)
    with contextlib.nullcontext() if draws is None else draws.while_building():
        kind = GPTModel if lora is None else functools.partial(AdapterGPTModel, lora)
        parts: dict[str, Any] = {"latent_norm_epsilon": latent_norm_epsilon, "lora": lora}
        model = kind(
            config=config,
            transformer_layer_spec=decoder_block_spec(config, vp_stage=vp_stage, **parts),
            mtp_block_spec=mtp_block_spec(config, vp_stage=vp_stage, **parts),
            vocab_size=vocab_size,
            max_sequence_length=max_sequence_length,
            parallel_output=True,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            rotary_base=int(rotary_base),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
    if post_process:
        rank = model.tp_group.rank()
        mask_output_layer(model.output_layer, num_ids, rank)
        if draws is not None:
            draws.fill_output_layer(model.output_layer, rank)
    return model


def model_config_from_args(args: Namespace, num_ids: int | None = None) -> K2ModelConfig:
    """Megatron's own derivation from flags, then the fields that its flags do not reach.

    Args:
        args: Megatron's and ours.
        num_ids: of the tokenizer, where it is not ``--vocab-size`` that gives them.
    """
    from megatron.training.argument_utils import gpt_config_from_args

    config: Any = gpt_config_from_args(args, model_config_cls=K2ModelConfig)
    config.latent_norm_epsilon = args.latent_norm_epsilon
    config.fp8_activation_storage = args.fp8_activation_storage
    config.num_ids = args.vocab_size if num_ids is None else num_ids
    config.packs_documents = args.sft_data is not None
    if args.lora_rank is not None:
        config.lora = settings_of(
            args.lora_rank,
            args.lora_alpha,
            args.lora_targets,
            args.lora_dropout,
            seed=args.seed,
            base=args.lora_base,
            holds_fp8=args.lora_base_fp8,
        )
    transformer = config.transformer
    if args.fp8_activation_storage:
        # SwiGLU as one operation, which saves its input and nothing else; the CPU's flags have it
        # as a chain. The forward pass computes the same.
        transformer.bias_activation_fusion = True
    transformer.beta_fast = args.yarn_mla_beta_fast
    transformer.beta_slow = args.yarn_mla_beta_slow
    transformer.original_max_position_embeddings = args.yarn_mla_original_max_position_embeddings
    if transformer.transformer_impl == "transformer_engine" and args.muonclip:
        # TE's attention then returns S_max. Only the model's config says so: Megatron's --qk-clip
        # and --log-max-attention-logit would also start its own clip after each step.
        transformer.log_max_attention_logit = True
    transformer.finalize_model_grads_func = BalancedFinalize(
        finalize_model_grads,
        rule=args.moe_bias_rule,
        is_counting=args.eod_mask_loss and not args.calculate_per_token_loss,
    )
    return config
