"""The flag list of a run, read once: what this package must know of it before Megatron parses it.

No torch and no Megatron, so that the command line answers at once. The values are those Megatron's
own parser would read, with its defaults; what is absent and has no default here is ``None``.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.parallel.layout import MEGATRON_NAMES, Layout, Workload, check_degrees
from megatron_k2.parallel.pipeline_split import PipelineSplit

_KINDS: dict[Any, dict[str, Any]] = {
    bool: {"action": "store_true"},
    int: {"type": int},
    int | None: {"type": int},
    float: {"type": float},
    float | None: {"type": float},
    tuple[str, ...]: {"nargs": "*"},
    tuple[str, ...] | None: {"nargs": "*"},
    tuple[float, ...]: {"nargs": "*", "type": float},
}
"""A field's type -> how argparse reads its flag; anything else is one word of text."""


@dataclass(frozen=True)
class RunFlags:
    """A run's flags. A field is the value of the flag of its name, ``in`` finds a flag by name."""

    words: tuple[str, ...]
    """The list itself, as ``flags.megatron.expand`` returns it."""

    tensor_model_parallel_size: int | None = None
    pipeline_model_parallel_size: int | None = None
    context_parallel_size: int | None = None
    expert_model_parallel_size: int | None = None
    expert_tensor_parallel_size: int | None = None
    num_virtual_stages_per_pipeline_rank: int | None = None
    pipeline_model_parallel_layout: str | None = None
    decoder_first_pipeline_num_layers: int | None = None
    decoder_last_pipeline_num_layers: int | None = None
    account_for_embedding_in_pipeline_split: bool = False
    account_for_loss_in_pipeline_split: bool = False
    num_layers_per_virtual_pipeline_stage: int | None = None
    no_overlap_p2p_communication: bool = False

    seq_length: int | None = None
    global_batch_size: int | None = None
    micro_batch_size: int | None = None
    step_batch_size_schedule: str | None = None

    train_samples: int | None = None
    train_iters: int | None = None
    lr: float | None = None
    min_lr: float = 0.0
    lr_warmup_init: float = 0.0
    lr_decay_style: str = "linear"
    lr_warmup_fraction: float | None = None
    lr_warmup_samples: int = 0
    lr_warmup_iters: int = 0
    lr_decay_samples: int | None = None
    lr_decay_iters: int | None = None
    weight_decay: float = 0.01
    start_weight_decay: float | None = None
    end_weight_decay: float | None = None
    weight_decay_incr_style: str = "constant"

    preset: str | None = None
    num_layers: int | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_head_dim: int | None = None
    qk_pos_emb_head_dim: int | None = None
    v_head_dim: int | None = None
    num_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    moe_router_topk: int | None = None
    moe_shared_expert_intermediate_size: int | None = None
    vocab_size: int | None = None

    distributed_backend: str = "nccl"
    transformer_impl: str = "local"
    fp4_format: str | None = None
    fp8_format: str | None = None
    fp8_recipe: str | None = None
    moe_router_dtype: str | None = None
    moe_router_load_balancing_type: tuple[str, ...] = ()
    moe_aux_loss_coeff: tuple[float, ...] = ()
    mtp_num_layers: int | None = None
    moe_token_dispatcher_type: str | None = None
    moe_flex_dispatcher_backend: str = "deepep"
    recompute_modules: tuple[str, ...] = ()
    optimizer_offload_fraction: float = 1.0
    qk_clip_threshold: float | None = None

    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] | None = None
    lora_dropout: float = 0.0
    lora_base: str | None = None

    save: str | None = None
    load: str | None = None
    ckpt_step: int | None = None
    resumed_without: str | None = None
    pretrained_checkpoint: str | None = None
    finetune: bool = False

    data: str | None = None
    data_path: tuple[str, ...] = ()
    data_args_path: str | None = None
    data_cache_path: str | None = None
    split: str | None = None
    train_data_path: tuple[str, ...] = ()
    valid_data_path: tuple[str, ...] = ()
    test_data_path: tuple[str, ...] = ()
    per_split_data_args_path: str | None = None
    null_tokenizer_eod_id: int | None = None
    sft_data: tuple[str, ...] = ()
    sft_loss: str = "token"

    def __contains__(self, flag: object) -> bool:
        return flag in self.words

    def layout(self, world_size: int) -> Layout:
        """The parallel layout over ``world_size`` ranks; experts are split as TP says by default.

        Raises:
            UserError: for a degree below 1.
        """
        given = {field: getattr(self, name) for field, name in MEGATRON_NAMES.items()}
        degrees = {field: 1 if degree is None else degree for field, degree in given.items()}
        if given["etp"] is None:
            degrees["etp"] = degrees["tp"]
        chunks = self.num_virtual_stages_per_pipeline_rank
        layout = Layout(
            world_size,
            **degrees,
            vpp=1 if chunks is None else chunks,
            pipeline_layout=self.pipeline_model_parallel_layout,
            split=PipelineSplit(
                first=self.decoder_first_pipeline_num_layers,
                last=self.decoder_last_pipeline_num_layers,
                counts_embedding=self.account_for_embedding_in_pipeline_split,
                counts_loss=self.account_for_loss_in_pipeline_split,
                layers_per_chunk=self.num_layers_per_virtual_pipeline_stage,
            ),
        )
        check_degrees(layout)
        return layout

    def workload(self, layout: Layout) -> Workload:
        """What ``layout`` must divide; a batch is one micro-batch a replica by default.

        Raises:
            UserError: naming the flags that are missing.
        """
        sizes = {
            "micro_batch_size": self.micro_batch_size,
            "seq_length": self.seq_length,
            "num_layers": self.num_layers,
            "num_attention_heads": self.num_attention_heads,
        }
        given = {name: size for name, size in sizes.items() if size is not None}
        if missing := [_flag(name) for name in sizes if name not in given]:
            raise UserError(f"missing {', '.join(missing)}; give them, or --preset NAME")
        batch = self.global_batch_size
        if batch is None:
            batch = given["micro_batch_size"] * max(1, layout.data_parallel)
        return Workload(
            **given,
            num_moe_experts=self.num_experts,
            global_batch_size=batch,
            overlap_p2p_comm=not self.no_overlap_p2p_communication,
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def read_flags(words: Sequence[str]) -> RunFlags:
    """A flag list as Megatron's parser would read it; flags without a field are passed over.

    Raises:
        UserError: where a number is expected and none stands there.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for field in fields(RunFlags):
        if field.name != "words":
            parser.add_argument(_flag(field.name), **_KINDS.get(field.type, {}))
    try:
        found, _ = parser.parse_known_args(list(words))
    except SystemExit:
        raise UserError("a size flag has no whole number behind it; see the usage above") from None
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in vars(found).items()
    }
    return RunFlags(tuple(words), **{k: v for k, v in values.items() if v is not None})
