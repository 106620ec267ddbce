"""Wrong input refused before anything expensive, and a killed run's leftovers put in order.

Works on the run's flags alone: no torch, no Megatron, so the command line answers at once and
every rank started by hand refuses the same way.
"""

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np

from megatron_k2.errors import UserError
from megatron_k2.flags.data import check_files, check_same_data, training_contents
from megatron_k2.flags.lora import check_base
from megatron_k2.flags.words import last_value
from megatron_k2.fp8.compute import check_fp8
from megatron_k2.host.repairs import (
    installed_version,
    require_checked_megatron,
    require_transformer_engine,
)
from megatron_k2.model.lora.settings import settings_of
from megatron_k2.parallel.layout import check_layout
from megatron_k2.run.flags import RunFlags
from megatron_k2.run.iterations import has_tracker, tracker_text
from megatron_k2.run.record import RUN_RECORD, read_run_record, write_record
from megatron_k2.training.resume import check_schedule

_SHAPE_FLAGS = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads q_lora_rank kv_lora_rank "
    "qk_head_dim qk_pos_emb_head_dim v_head_dim num_experts moe_ffn_hidden_size moe_router_topk "
    "moe_shared_expert_intermediate_size vocab_size"
).split()
"""What must agree between a checkpoint and the run that loads it."""


def check_run(flags: RunFlags, world_size: int) -> None:
    """Refuse what cannot run.

    Args:
        flags: of the run, expanded.
        world_size: ranks that will be started.

    Raises:
        UserError: naming the value, what was expected, and the way out.
    """
    require_checked_megatron()
    layout = flags.layout(world_size)
    check_layout(layout, flags.workload(layout))
    if flags.lora_rank is not None:
        _check_lora(flags)
    _check_fp4(flags)
    check_fp8(
        flags,
        fp8_format=flags.fp8_format,
        transformer_impl=flags.transformer_impl,
        router_dtype=flags.moe_router_dtype,
        te_version=installed_version("transformer-engine"),
    )
    if flags.transformer_impl == "local" and "mla_up_proj" in flags.recompute_modules:
        raise UserError(
            "--recompute-modules mla_up_proj with --transformer-impl local frees nothing: this "
            "attention keeps copies of queries, keys and values; drop it, or use "
            "--transformer-impl transformer_engine"
        )
    if "--fine-grained-activation-offloading" in flags:
        _check_affinity_packages()
    if "--muonclip-cpu-offload" in flags:
        _check_offload(flags)
    if flags.transformer_impl == "transformer_engine":
        require_transformer_engine()
    if "--keep-optimizer" in flags:
        _check_phase_start(flags)
    _check_dispatcher(flags)
    _check_checkpoint_worker(flags)
    check_files(flags)
    check_schedule(flags)
    if flags.load and not flags.finetune:
        _check_checkpoint(Path(flags.load), flags)


def _check_lora(flags: RunFlags) -> None:
    """Adapters that can be built, on a base of this model."""
    assert flags.lora_rank is not None
    settings_of(flags.lora_rank, flags.lora_alpha, flags.lora_targets, flags.lora_dropout)
    if flags.fp8_format is not None or flags.fp4_format is not None:
        raise UserError(
            "--lora-rank with --fp8-format or --fp4-format: Transformer Engine's products are "
            "those of its own linears, adapters stand beside Megatron's; drop the format"
        )
    if "--delay-wgrad-compute" in flags:
        raise UserError(
            "--delay-wgrad-compute with --lora-rank: a frozen weight has no gradient to delay; "
            "drop it (--overlap-moe-expert-parallel-comm works without)"
        )
    if "--lora-base-fp8" in flags and "--fp8-activation-storage" in flags:
        raise UserError(
            "--lora-base-fp8 with --fp8-activation-storage: both decide what backward keeps of the "
            "same products; drop one of the two"
        )
    check_base(flags)
    _check_shape(Path(str(flags.lora_base)).parent, flags)


def _check_phase_start(flags: RunFlags) -> None:
    """The optimizer of another run: MuonClip's, and there."""
    if "--muonclip" not in flags:
        raise UserError(
            "--keep-optimizer is MuonClip's: Megatron looks for another optimizer's groups by the "
            "rates of this run; add --optimizer muonclip, or drop the flag"
        )
    is_resumed = flags.load is not None and has_tracker(Path(flags.load))
    if flags.pretrained_checkpoint is None or is_resumed:
        return
    found = tracker_text(Path(flags.pretrained_checkpoint))
    found = "no checkpoint" if found is None else found
    if not found.isdigit():
        raise UserError(
            f"--keep-optimizer: {flags.pretrained_checkpoint} has {found}, and no optimizer's "
            "state; drop the flag, in a recipe --set keeps_optimizer=false"
        )


def _check_dispatcher(flags: RunFlags) -> None:
    """The fused dispatcher needs its package, a router in fp32, and ranks to send to."""
    if flags.moe_token_dispatcher_type != "flex":
        return
    backend = flags.moe_flex_dispatcher_backend
    if (flags.tensor_model_parallel_size or 1) * (flags.expert_model_parallel_size or 1) == 1:
        raise UserError(
            "--moe-token-dispatcher-type flex: TP x EP is 1 and no token leaves its rank; give "
            "--expert-model-parallel-size, or take alltoall"
        )
    if flags.distributed_backend == "gloo":
        raise UserError(
            "--moe-token-dispatcher-type flex: its kernels are CUDA's; on a CPU take alltoall"
        )
    if flags.moe_router_dtype != "fp32":
        raise UserError(
            f"--moe-router-dtype {flags.moe_router_dtype}: {backend} takes fp32 probabilities; "
            "add --moe-router-dtype fp32"
        )
    if backend != "ncclep" and importlib.util.find_spec("deep_ep") is None:
        raise UserError(
            f"--moe-flex-dispatcher-backend {backend}: package deep_ep is not installed "
            "(github.com/deepseek-ai/DeepEP, for HybridEP its branch of that name); install it on "
            "every node, or take --moe-token-dispatcher-type alltoall"
        )


def _check_checkpoint_worker(flags: RunFlags) -> None:
    """Megatron's process that writes all checkpoints; where it cannot start, the run would wait."""
    if "--use-persistent-ckpt-worker" not in flags:
        return
    if flags.distributed_backend == "gloo":
        raise UserError(
            "--use-persistent-ckpt-worker: Megatron's worker wants a GPU, and without one the run "
            "waits for it for ever; drop the flag, --async-save does without"
        )
    package = "nvidia_resiliency_ext"
    is_nvrx = (last_value(flags.words, "--async-strategy") or "nvrx") == "nvrx"
    if is_nvrx and importlib.util.find_spec(package) is None:
        raise UserError(
            f"--use-persistent-ckpt-worker: package {package} is not installed; add "
            "--async-strategy mcore, or pip install nvidia-resiliency-ext"
        )


_NOT_OFFLOADED = {
    "--fp8-param-gather": "FP8 weights are quantised all at once, masters visit one after another",
    "--log-params-norm": "it reads masters, which are on the host between steps",
    "--log-muon-steps": "it reads AdamW's moments, which are on the host between steps",
    "--async-save": "a step would change the host's copies while they are being written",
}
"""Flags that optimizer states on the host do not go with -> why."""


def _check_affinity_packages() -> None:
    """Megatron binds ranks that offload to their GPU's cores; what it needs it does not declare."""
    for module, package in (("cuda.bindings.driver", "cuda-python"), ("pynvml", "nvidia-ml-py")):
        try:
            importlib.import_module(module)
        except ImportError:
            raise UserError(
                f"--fine-grained-activation-offloading: Megatron imports {module}, which is not "
                f"here; pip install {package}"
            ) from None


def _check_offload(flags: RunFlags) -> None:
    """MuonClip's states in host memory: over ZeRO, a part of them, and nobody else reads them."""
    if "--use-distributed-optimizer" not in flags:
        raise UserError(
            "--optimizer-cpu-offload with MuonClip moves a rank's ZeRO-1 shards; add "
            "--use-distributed-optimizer"
        )
    fraction = flags.optimizer_offload_fraction
    if not 0 < fraction <= 1:
        raise UserError(
            f"--optimizer-offload-fraction {fraction:g}: a fraction above 0, at most 1, is "
            "expected; for none, drop --optimizer-cpu-offload"
        )
    for flag, reason in _NOT_OFFLOADED.items():
        if flag in flags:
            raise UserError(f"{flag} with --optimizer-cpu-offload: {reason}; drop one of the two")


def _check_fp4(flags: RunFlags) -> None:
    """FP4 is Transformer Engine's alone."""
    if flags.fp4_format and installed_version("transformer-engine") is None:
        raise UserError(
            f"--fp4-format {flags.fp4_format} needs Transformer Engine; without it Megatron "
            "ignores the flag and trains in the base precision"
        )


def _shape(flags: RunFlags) -> dict[str, Any]:
    return {name: getattr(flags, name) for name in _SHAPE_FLAGS}


def _check_checkpoint(load: Path, flags: RunFlags) -> None:
    saved = _check_shape(load, flags)
    if saved and has_tracker(load) and os.environ.get("RANK", "0") == "0":
        check_same_data(load, saved.get("data", {}), flags)


def _check_shape(load: Path, flags: RunFlags) -> dict[str, Any]:
    """The record of the run in ``load``, whose model must be this one; empty if it has none."""
    saved = read_run_record(load)
    if not saved:
        return saved
    shape = saved.get("shape", {})
    differing = {
        name: (shape.get(name), value)
        for name, value in _shape(flags).items()
        if shape.get(name) != value
    }
    if differing:
        listed = "; ".join(f"{name} {a} there, {b} here" for name, (a, b) in differing.items())
        raise UserError(
            f"{load} holds a checkpoint of another model (preset {saved.get('preset')}): {listed}. "
            "Use that preset, or another --save directory"
        )
    return saved


def write_run_record(flags: RunFlags, world_size: int) -> None:
    """``run.json`` beside the run's output: what it is, and with which versions."""
    if flags.save is None:
        return
    record = {
        "preset": flags.preset,
        "shape": _shape(flags),
        "qk_clip_threshold": flags.qk_clip_threshold,
        "data": training_contents(flags),
        "world_size": world_size,
        "flags": flags.words,
    }
    write_record(Path(flags.save) / RUN_RECORD, record)


def drop_damaged_index_cache(prefixes: list[str], cache: str | None = None) -> None:
    """Remove sample indices that a kill cut short; Megatron builds them again.

    It writes ``PREFIX/cache/*/*.npy``, or with ``--data-cache-path`` ``cache/*.npy``, in place and
    trusts whatever it finds there.
    """
    found = [path for prefix in prefixes for path in Path(prefix).glob("cache/*/*.npy")]
    for path in (*found, *(Path(cache).glob("*.npy") if cache is not None else ())):
        try:
            np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError):
            path.unlink(missing_ok=True)
