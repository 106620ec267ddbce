"""A preset is only a set of Megatron flags: this module writes them down.

``expand`` turns ``--preset NAME`` and ``--data DIR`` into Megatron's own flags, in front of what
the user typed, so that the user's flags win. The program then sees nothing but flags, which
``--print-args`` prints. What has no upstream flag is one of ours, declared in ``add_k2_arguments``.
"""

import argparse
import importlib.util
from pathlib import Path

from megatron_k2.data.manifest import DataManifest, TokenizerRecord, read_manifest
from megatron_k2.errors import UserError
from megatron_k2.flags.data import ALLOW_OTHER_DATA
from megatron_k2.flags.lora import add_lora_arguments, over_base
from megatron_k2.flags.schedule import displaced
from megatron_k2.flags.start import RESUMED_WITHOUT, START_OVER, choose_checkpoint
from megatron_k2.flags.words import last_value, take
from megatron_k2.fp8.compute import recipe_flags
from megatron_k2.presets import ModelPreset, YarnScaling, get_preset
from megatron_k2.run.rollback import MARGIN
from megatron_k2.run.spikes import LEAST_NATS

CPU_FLAGS = (
    "--distributed-backend gloo --transformer-impl local --use-cpu-initialization "
    "--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion "
    "--no-bias-dropout-fusion --no-rope-fusion --no-persist-layer-norm --num-workers 0 "
    "--muonclip-dtype fp32"
).split()
"""Everything that asks for a CUDA kernel or an extension, switched off."""

LOCAL_CUDA_FLAGS = (
    "--distributed-backend nccl --transformer-impl local --no-gradient-accumulation-fusion "
    "--no-masked-softmax-fusion --no-persist-layer-norm --no-rope-fusion"
).split()
"""CUDA without Transformer Engine or apex."""

TE_CUDA_FLAGS = (
    "--distributed-backend nccl --transformer-impl transformer_engine --moe-grouped-gemm "
    "--moe-permute-fusion --moe-router-fusion --cross-entropy-loss-fusion "
    "--cross-entropy-fusion-impl native --attention-backend fused --no-rope-fusion"
).split()
"""CUDA with Transformer Engine. ``fused`` is cuDNN's attention: MuonClip's maximum logits turn
FlashAttention off, and ``auto`` could then fall back to holding every logit in memory. Megatron's
fused rotary embedding of MLA knows YaRN only; TE's cross entropy is refused by Megatron."""

SFT_DATA = "--sft-data"
OUR_OFFLOAD = "--muonclip-cpu-offload"

APEX_WEIGHT_GRADIENTS = "fused_weight_gradient_mlp_cuda"
"""apex's extension, without which the output head cannot add its gradient up in its product."""


def add_k2_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Megatron's ``extra_args_provider``: what Megatron-Core 0.19.2 has no flag for."""
    group = parser.add_argument_group("megatron_k2")
    group.add_argument("--preset", default=None, help="name of the preset these flags came from")
    group.add_argument("--data", default=None, help="directory made by 'megatron-k2 data prepare'")
    group.add_argument(
        "--keep-optimizer",
        action="store_true",
        help="with --pretrained-checkpoint: its optimizer's state too, not the weights alone; "
        "schedule and samples begin anew",
    )
    group.add_argument(
        START_OVER,
        action="store_true",
        help="begin from --load, --pretrained-checkpoint or anew although --save has a checkpoint; "
        "that and what belongs to it are put into a folder of --save",
    )
    group.add_argument(
        RESUMED_WITHOUT,
        default=None,
        help="written by a start from --save's own checkpoint: what of the command that leaves out",
    )
    group.add_argument(
        "--synthetic-data",
        action="store_true",
        help="make a small corpus at every absent prefix of --train-data-path, which ends in the "
        "name of one of data/synthetic.py's domains",
    )
    group.add_argument(
        ALLOW_OTHER_DATA,
        action="store_true",
        help="go on from a checkpoint though the training data's content has changed since",
    )
    _add_optimizer_arguments(group)
    _add_model_arguments(group)
    _add_spike_arguments(group)
    add_lora_arguments(group)
    group.add_argument(
        SFT_DATA,
        nargs="+",
        default=None,
        help="fine-tune on packed documents: a directory of 'megatron-k2 data chat', or weights "
        "and directories, alternating; one of 'data prepare' is pretraining text",
    )
    group.add_argument(
        "--sft-loss",
        choices=["token", "sample"],
        default="token",
        help="mean over the targets of a global batch, or over its samples",
    )
    group.add_argument(
        "--console",
        choices=["k2", "megatron"],
        default="k2",
        help="k2: one line a log interval, Megatron's own output to SAVE/logs; megatron: as is",
    )
    return parser


def _add_optimizer_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--muonclip",
        action="store_true",
        help="MuonClip in place of Megatron's muon (what '--optimizer muonclip' expands to)",
    )
    group.add_argument(
        "--muonclip-cpu-offload",
        action="store_true",
        help="keep --optimizer-offload-fraction of MuonClip's states in host memory (what "
        "'--optimizer-cpu-offload' expands to with '--optimizer muonclip')",
    )
    group.add_argument(
        "--muonclip-dtype",
        choices=["bf16", "fp32"],
        default="bf16",
        help="dtype of the Newton-Schulz iteration (Moonlight: bf16)",
    )
    group.add_argument(
        "--muonclip-triton-symmetric",
        action=argparse.BooleanOptionalAction,
        help="on GPUs, compute one triangle of all of Newton-Schulz's symmetric products, by a "
        "Triton kernel, or of none (default: of those that it was measured to speed up)",
    )
    group.add_argument(
        "--qk-clip-grouped-query",
        choices=["query", "group"],
        default="query",
        help="grouped-query attention: scale the hot query heads alone, or their whole group",
    )
    group.add_argument(
        "--no-muon-idle-floor",
        action="store_true",
        help="keep stepping at full length in a stale direction where a matrix has no gradient",
    )
    group.add_argument(
        "--muon-per-head",
        action="store_true",
        help="orthogonalise each head's rows of MLA's query and key-value up-projections on their "
        "own (not stated for K2; default: whole)",
    )
    group.add_argument(
        "--muon-router",
        choices=["muon", "adamw"],
        default="muon",
        help="optimizer of the router's weight (not stated for K2)",
    )
    group.add_argument(
        "--log-muon-steps",
        action="store_true",
        help="log the RMS of each group's updates and the seconds of Muon's exchange and "
        "Newton-Schulz (costs one pass over the updates)",
    )
    group.add_argument(
        "--clip-grad-scope",
        choices=["all", "adam"],
        default="all",
        help="gradients that --clip-grad scales: all (Megatron's rule; not stated for K2), or "
        "AdamW's alone; the norm is over all either way",
    )


def _add_spike_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--on-spike",
        choices=["off", "warn", "stop", "rollback"],
        default="warn",
        help="a loss far over the median of the last steps: say so; end with code 3 before the "
        "next save; or go back to the checkpoint before it and leave its batches out",
    )
    group.add_argument(
        "--spike-nats",
        type=float,
        default=LEAST_NATS,
        help="nats over the median under which nothing is a spike",
    )
    group.add_argument(
        "--spike-margin",
        type=int,
        default=MARGIN,
        help="steps on either side of a spike that a rollback leaves out too",
    )


def _add_model_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--yarn-mla-beta-fast",
        type=float,
        default=32.0,
        help="YaRN beta_fast of MLA (upstream's --yarn-beta-fast does not reach MLA)",
    )
    group.add_argument(
        "--yarn-mla-beta-slow", type=float, default=1.0, help="YaRN beta_slow of MLA"
    )
    group.add_argument(
        "--yarn-mla-original-max-position-embeddings",
        type=int,
        default=4096,
        help="context the rotary frequencies were trained at",
    )
    group.add_argument(
        "--latent-norm-epsilon",
        type=float,
        default=1e-6,
        help="epsilon of MLA's two latent norms (Megatron uses --norm-epsilon for all)",
    )
    group.add_argument(
        "--moe-bias-rule",
        choices=["sign", "mean-sign"],
        default="sign",
        help="router bias update: DeepSeek-V3's, or Moonlight's with the mean sign taken out",
    )
    group.add_argument(
        "--fp8-activation-storage",
        action="store_true",
        help="keep the inputs of the routed experts' up-projection and of SwiGLU for backward in "
        "FP8 (E4M3, 1x128 tiles, fp32 scales), as the report does; computation is untouched",
    )


def model_flags(p: ModelPreset, *, yarn: bool = False) -> list[str]:
    """Flags of the architecture of ``p``; ``yarn``: with its rotary scaling switched on."""
    flags = f"""
        --num-layers {p.num_layers} --hidden-size {p.hidden_size}
        --ffn-hidden-size {p.ffn_hidden_size} --num-attention-heads {p.num_attention_heads}
        --normalization RMSNorm --norm-epsilon {p.norm_epsilon} --swiglu --disable-bias-linear
        --untie-embeddings-and-output-weights --init-method-std {p.init_method_std}
        --attention-dropout 0 --hidden-dropout 0
        --position-embedding-type rope --rotary-base {int(p.rotary_base)}
        --multi-latent-attention --qk-layernorm --kv-lora-rank {p.kv_lora_rank}
        --qk-head-dim {p.qk_head_dim} --qk-pos-emb-head-dim {p.qk_pos_emb_head_dim}
        --v-head-dim {p.v_head_dim} --latent-norm-epsilon {p.latent_norm_epsilon}
        --num-experts {p.num_moe_experts}
        --moe-layer-freq ([0]*{p.num_dense_layers}+[1]*{p.num_moe_layers})
        --moe-ffn-hidden-size {p.moe_ffn_hidden_size} --moe-router-topk {p.moe_router_topk}
        --moe-shared-expert-intermediate-size {p.moe_shared_expert_intermediate_size}
        --moe-router-score-function sigmoid --moe-router-dtype fp32
        --moe-router-enable-expert-bias
        --moe-router-bias-update-rate {p.moe_router_bias_update_rate}
        --moe-router-topk-scaling-factor {p.moe_router_topk_scaling_factor}
        --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff {p.moe_aux_loss_coeff}
        --moe-token-dispatcher-type alltoall
        --make-vocab-size-divisible-by 1
    """.split()
    if p.q_lora_rank is not None:
        flags += ["--q-lora-rank", str(p.q_lora_rank)]
    if p.num_mtp_layers:
        flags += ["--mtp-num-layers", str(p.num_mtp_layers)]
    return flags + (yarn_flags(p.yarn) if yarn and p.yarn else ["--rope-type", "rope"])


def yarn_flags(yarn: YarnScaling) -> list[str]:
    """Flags of YaRN's rotary scaling as MLA takes it: some are Megatron's, some ours."""
    return f"""
        --rope-type yarn --rotary-scaling-factor {yarn.rotary_scaling_factor}
        --mscale {yarn.mscale} --mscale-all-dim {yarn.mscale_all_dim}
        --yarn-mla-beta-fast {yarn.beta_fast} --yarn-mla-beta-slow {yarn.beta_slow}
        --yarn-mla-original-max-position-embeddings {yarn.original_max_position_embeddings}
    """.split()


def training_flags(p: ModelPreset) -> list[str]:
    """Batch, schedule and optimizer of ``p``."""
    t = p.training
    return f"""
        --seq-length {t.seq_length} --max-position-embeddings {t.seq_length}
        --micro-batch-size {t.micro_batch_size} --global-batch-size {t.global_batch_size}
        --train-samples {t.train_samples}
        --lr {t.lr} --min-lr {t.min_lr} --lr-decay-style WSD --lr-wsd-decay-style cosine
        --lr-warmup-samples {t.lr_warmup_samples} --lr-decay-samples {t.lr_decay_samples}
        --lr-wsd-decay-samples {t.lr_wsd_decay_samples}
        --weight-decay {t.weight_decay} --clip-grad {t.clip_grad}
        --adam-beta1 {t.adam_beta1} --adam-beta2 {t.adam_beta2} --adam-eps {t.adam_eps}
        --optimizer muonclip --muon-momentum {t.muon_momentum} --muon-nesterov
        --muon-scale-mode spectral --muon-extra-scale-factor 0.2
        --muon-coefficient-type simple --muon-num-ns-steps {t.muon_ns_steps}
        --qk-clip-threshold {t.qk_clip_threshold}
        --calculate-per-token-loss --no-create-attention-mask-in-dataloader
        --ckpt-format torch_dist --save-interval 100
        --log-interval 10 --eval-interval 1000 --eval-iters 10
    """.split()


def data_flags(directory: str, manifest: DataManifest) -> list[str]:
    """Prefixes of the splits, and of the tokenizer what training needs: its end-of-document id."""
    root = Path(directory)
    splits = {name: str(root / split.prefix) for name, split in manifest.splits.items()}
    flags = ["--data", directory, "--train-data-path", splits["train"]]
    flags += ["--valid-data-path", splits["valid"]] if "valid" in splits else []
    eod = str(manifest.tokenizer.eod_id)
    return [*flags, "--tokenizer-type", "NullTokenizer", "--null-tokenizer-eod-id", eod]


def platform_flags(*, cuda: bool, transformer_impl: str = "local") -> list[str]:
    """Flags that the machine and ``--transformer-impl`` need, whatever the model."""
    if cuda and transformer_impl == "transformer_engine":
        has_apex = importlib.util.find_spec(APEX_WEIGHT_GRADIENTS) is not None
        return [*TE_CUDA_FLAGS, *([] if has_apex else ["--no-gradient-accumulation-fusion"])]
    return list(LOCAL_CUDA_FLAGS if cuda else CPU_FLAGS)


def expand(argv: list[str], *, cuda: bool) -> list[str]:
    """The plain flag list that Megatron's parser and ours read.

    Args:
        argv: what the user typed: ``--preset``, ``--data``, ``--yarn``, ``--fp8-compute`` and any
            Megatron flag.
        cuda: whether this machine has CUDA.

    Raises:
        UserError: unknown preset or FP8 recipe, ``--yarn`` without its numbers, unusable data
            directory, or a vocabulary that does not match.
    """
    preset_name, rest = take(argv, "--preset")
    directory, rest = take(rest, "--data")
    yarn = "--yarn" in rest
    rest = [flag for flag in rest if flag != "--yarn"]
    fp8_recipe, rest = take(rest, "--fp8-compute")
    implementation = last_value(rest, "--transformer-impl") or "local"
    flags = platform_flags(cuda=cuda, transformer_impl=implementation)
    flags += recipe_flags(fp8_recipe) if fp8_recipe is not None else []
    if yarn and preset_name is None:
        raise UserError(
            "--yarn takes its numbers from a preset; give --preset, or --rope-type yarn"
        )
    if preset_name is not None:
        preset = get_preset(preset_name)
        if yarn and preset.yarn is None:
            raise UserError(f"--yarn: preset '{preset_name}' has no YaRN scaling; leave it out")
        training = displaced(training_flags(preset), rest, preset.training)
        flags += ["--preset", preset_name, *model_flags(preset, yarn=yarn), *training]
        vocab = int(last_value(rest, "--vocab-size") or preset.vocab_size)
    else:
        vocab = int(last_value(rest, "--vocab-size") or 0)
    _, rest = take(rest, "--vocab-size")
    if directory is not None:
        manifest = read_manifest(directory)
        check_vocabulary(manifest.tokenizer, vocab, preset_name)
        flags += data_flags(directory, manifest)
    if "--mock-data" in rest and last_value(rest, "--tokenizer-type") is None:
        rest = ["--tokenizer-type", "NullTokenizer", *rest]
    flags += rest
    if vocab:
        flags += ["--vocab-size", str(vocab)]
    flags = over_base(flags, rest)
    flags = choose_checkpoint(flags)  # the same command, run again, goes on
    save = last_value(flags, "--save")
    if save is not None and last_value(flags, "--tensorboard-dir") is None:
        flags += ["--tensorboard-dir", str(Path(save) / "tensorboard")]
    return _muonclip(flags)


def check_vocabulary(tokenizer: TokenizerRecord, vocab_size: int, preset: str | None) -> None:
    """Refuse data whose ids are not the model's."""
    data_vocab = tokenizer.vocab_size
    if data_vocab != vocab_size:
        raise UserError(
            f"the data's vocabulary has {data_vocab} ids, the model's {vocab_size}"
            f"{f' (preset {preset})' if preset else ''}; prepare the data with this model's "
            f"tokenizer, or train a model of that vocabulary with --vocab-size {data_vocab}"
        )


def _muonclip(flags: list[str]) -> list[str]:
    """``--optimizer muonclip`` as flags that Megatron's closed list of optimizers accepts."""
    optimizer, rest = take(flags, "--optimizer")
    if optimizer is None:
        return flags
    if optimizer != "muonclip":
        return [*rest, "--optimizer", optimizer]
    # Megatron's flag makes its factory build AdamW's hybrid optimizer; the fraction stays as it is.
    rest = [OUR_OFFLOAD if flag == "--optimizer-cpu-offload" else flag for flag in rest]
    if "--use-distributed-optimizer" not in rest:
        return [*rest, "--optimizer", "muon", "--muonclip"]
    # Megatron's validation must see adam: any other name makes ZeRO layer-wise. Our checkpoint
    # format is by parameter; the flag tells Megatron that another TP or PP may load it.
    reshardable = "--dist-ckpt-optim-fully-reshardable"
    extra = [] if reshardable in rest else [reshardable]
    return [*rest, "--optimizer", "adam", "--muonclip", *extra]
