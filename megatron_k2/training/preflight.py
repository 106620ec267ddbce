"""Wrong input refused before anything expensive, and a killed run's leftovers put in order.

Works on the expanded flags alone: no torch, no Megatron, so the command line answers at once and
every rank started by hand refuses the same way.
"""

import argparse
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from megatron_k2.errors import UserError
from megatron_k2.flags.data import check_files
from megatron_k2.fp8.compute import check_fp8
from megatron_k2.host.repairs import (
    installed_version,
    require_checked_megatron,
    require_transformer_engine,
)
from megatron_k2.parallel.layout import (
    MEGATRON_NAMES,
    Layout,
    Workload,
    check_degrees,
    check_layout,
)
from megatron_k2.run.iterations import has_tracker, tracker_text
from megatron_k2.run.record import RUN_RECORD, read_run_record, write_record

_LAYOUT_FLAGS = {
    "--tensor-model-parallel-size": "tensor_model_parallel_size",
    "--pipeline-model-parallel-size": "pipeline_model_parallel_size",
    "--context-parallel-size": "context_parallel_size",
    "--expert-model-parallel-size": "expert_model_parallel_size",
    "--num-virtual-stages-per-pipeline-rank": "num_virtual_stages",
    "--global-batch-size": "global_batch_size",
    "--micro-batch-size": "micro_batch_size",
    "--seq-length": "seq_length",
    "--num-layers": "num_layers",
    "--num-attention-heads": "num_attention_heads",
    "--num-experts": "num_moe_experts",
}
_SHAPE_FLAGS = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads q_lora_rank kv_lora_rank "
    "qk_head_dim qk_pos_emb_head_dim v_head_dim num_experts moe_ffn_hidden_size moe_router_topk "
    "moe_shared_expert_intermediate_size vocab_size"
).split()
"""What must agree between a checkpoint and the run that loads it."""


def read_flags(flags: list[str]) -> argparse.Namespace:
    """The few values this module looks at, as Megatron's parser would read them."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for flag, name in _LAYOUT_FLAGS.items():
        parser.add_argument(flag, dest=name, type=int, default=None)
    for name in _SHAPE_FLAGS:
        if name not in ("num_layers", "num_attention_heads", "num_experts"):
            parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=None)
    parser.add_argument("--expert-tensor-parallel-size", type=int, default=None)
    parser.add_argument("--pipeline-model-parallel-layout", default=None)
    parser.add_argument("--no-overlap-p2p-communication", action="store_true")
    parser.add_argument("--fp4-format", default=None)
    parser.add_argument("--fp8-format", default=None)
    parser.add_argument("--transformer-impl", default="local")
    parser.add_argument("--moe-router-dtype", default=None)
    parser.add_argument("--distributed-backend", default="nccl")
    parser.add_argument("--moe-token-dispatcher-type", default=None)
    parser.add_argument("--moe-flex-dispatcher-backend", default="deepep")
    parser.add_argument("--preset", default=None)
    parser.add_argument("--load", default=None)
    parser.add_argument("--pretrained-checkpoint", default=None)
    parser.add_argument("--save", default=None)
    parser.add_argument("--finetune", action="store_true")
    parser.add_argument("--qk-clip-threshold", type=float, default=None)
    parser.add_argument("--recompute-modules", nargs="*", default=[])
    parser.add_argument("--optimizer-offload-fraction", type=float, default=1.0)
    try:
        values, _ = parser.parse_known_args(flags)
    except SystemExit:
        raise UserError("a size flag has no whole number behind it; see the usage above") from None
    values.num_experts = values.num_moe_experts
    return values


def check_run(flags: list[str], world_size: int) -> None:
    """Refuse what cannot run.

    Args:
        flags: as ``flags.megatron.expand`` returns them.
        world_size: ranks that will be started.

    Raises:
        UserError: naming the value, what was expected, and the way out.
    """
    require_checked_megatron()
    values = read_flags(flags)
    layout = _layout(values, world_size)
    check_degrees(layout)
    check_layout(layout, _workload(values, layout))
    _check_fp4(values)
    check_fp8(
        flags,
        fp8_format=values.fp8_format,
        transformer_impl=values.transformer_impl,
        router_dtype=values.moe_router_dtype,
        te_version=installed_version("transformer-engine"),
    )
    if values.transformer_impl == "local" and "mla_up_proj" in values.recompute_modules:
        raise UserError(
            "--recompute-modules mla_up_proj with --transformer-impl local frees nothing: this "
            "attention keeps copies of queries, keys and values; drop it, or use "
            "--transformer-impl transformer_engine"
        )
    if "--fine-grained-activation-offloading" in flags:
        _check_affinity_packages()
    if "--muonclip-cpu-offload" in flags:
        _check_offload(flags, values.optimizer_offload_fraction)
    if values.transformer_impl == "transformer_engine":
        require_transformer_engine()
    if "--keep-optimizer" in flags:
        _check_phase_start(flags, values)
    _check_dispatcher(values)
    check_files(flags)
    if values.load and not values.finetune:
        _check_checkpoint(Path(values.load), values)


def _check_phase_start(flags: list[str], values: argparse.Namespace) -> None:
    """The optimizer of another run: MuonClip's, and there."""
    if "--muonclip" not in flags:
        raise UserError(
            "--keep-optimizer is MuonClip's: Megatron looks for another optimizer's groups by the "
            "rates of this run; add --optimizer muonclip, or drop the flag"
        )
    is_resumed = values.load is not None and has_tracker(Path(values.load))
    if values.pretrained_checkpoint is None or is_resumed:
        return
    found = tracker_text(Path(values.pretrained_checkpoint))
    found = "no checkpoint" if found is None else found
    if not found.isdigit():
        raise UserError(
            f"--keep-optimizer: {values.pretrained_checkpoint} has {found}, and no optimizer's "
            "state; drop the flag, in a recipe --set keeps_optimizer=false"
        )


def _check_dispatcher(values: argparse.Namespace) -> None:
    """The fused dispatcher needs its package, a router in fp32, and ranks to send to."""
    if values.moe_token_dispatcher_type != "flex":
        return
    backend = values.moe_flex_dispatcher_backend
    if (values.tensor_model_parallel_size or 1) * (values.expert_model_parallel_size or 1) == 1:
        raise UserError(
            "--moe-token-dispatcher-type flex: TP x EP is 1 and no token leaves its rank; give "
            "--expert-model-parallel-size, or take alltoall"
        )
    if values.distributed_backend == "gloo":
        raise UserError(
            "--moe-token-dispatcher-type flex: its kernels are CUDA's; on a CPU take alltoall"
        )
    if values.moe_router_dtype != "fp32":
        raise UserError(
            f"--moe-router-dtype {values.moe_router_dtype}: {backend} takes fp32 probabilities; "
            "add --moe-router-dtype fp32"
        )
    if backend != "ncclep" and importlib.util.find_spec("deep_ep") is None:
        raise UserError(
            f"--moe-flex-dispatcher-backend {backend}: package deep_ep is not installed "
            "(github.com/deepseek-ai/DeepEP, for HybridEP its branch of that name); install it on "
            "every node, or take --moe-token-dispatcher-type alltoall"
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


def _check_offload(flags: list[str], fraction: float) -> None:
    """MuonClip's states in host memory: over ZeRO, a part of them, and nobody else reads them."""
    if "--use-distributed-optimizer" not in flags:
        raise UserError(
            "--optimizer-cpu-offload with MuonClip moves a rank's ZeRO-1 shards; add "
            "--use-distributed-optimizer"
        )
    if not 0 < fraction <= 1:
        raise UserError(
            f"--optimizer-offload-fraction {fraction:g}: a part above 0 and up to 1 is expected; "
            "for none, drop --optimizer-cpu-offload"
        )
    for flag, reason in _NOT_OFFLOADED.items():
        if flag in flags:
            raise UserError(f"{flag} with --optimizer-cpu-offload: {reason}; drop one of the two")


def _layout(values: argparse.Namespace, world_size: int) -> Layout:
    given = {field: getattr(values, name) for field, name in MEGATRON_NAMES.items()}
    degrees = {field: 1 if degree is None else degree for field, degree in given.items()}
    if given["etp"] is None:
        degrees["etp"] = degrees["tp"]
    chunks = values.num_virtual_stages
    return Layout(
        world_size,
        **degrees,
        vpp=1 if chunks is None else chunks,
        pipeline_layout=values.pipeline_model_parallel_layout,
    )


def _workload(values: argparse.Namespace, layout: Layout) -> Workload:
    needed = ("micro_batch_size", "seq_length", "num_layers", "num_attention_heads")
    missing = [f"--{name.replace('_', '-')}" for name in needed if getattr(values, name) is None]
    if missing:
        raise UserError(f"missing {', '.join(missing)}; give them, or --preset NAME")
    batch = values.global_batch_size
    if batch is None:  # Megatron's default: one micro-batch a replica
        batch = values.micro_batch_size * max(1, layout.data_parallel)
    return Workload(
        num_layers=values.num_layers,
        num_attention_heads=values.num_attention_heads,
        num_moe_experts=values.num_moe_experts,
        seq_length=values.seq_length,
        global_batch_size=batch,
        micro_batch_size=values.micro_batch_size,
        overlap_p2p_comm=not values.no_overlap_p2p_communication,
    )


def _check_fp4(values: argparse.Namespace) -> None:
    """FP4 is Transformer Engine's alone."""
    if values.fp4_format and installed_version("transformer-engine") is None:
        raise UserError(
            f"--fp4-format {values.fp4_format} needs Transformer Engine; without it Megatron "
            "ignores the flag and trains in the base precision"
        )


def _shape(values: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(values, name) for name in _SHAPE_FLAGS}


def _check_checkpoint(load: Path, values: argparse.Namespace) -> None:
    saved = read_run_record(load)
    if not saved:
        return
    differing = {
        name: (saved["shape"].get(name), value)
        for name, value in _shape(values).items()
        if saved["shape"].get(name) != value
    }
    if differing:
        listed = "; ".join(f"{name} {a} there, {b} here" for name, (a, b) in differing.items())
        raise UserError(
            f"{load} holds a checkpoint of another model (preset {saved['preset']}): {listed}. "
            "Use that preset, or another --save directory"
        )


def write_run_record(flags: list[str], world_size: int) -> None:
    """``run.json`` beside the run's output: what it is, and with which versions."""
    values = read_flags(flags)
    if values.save is None:
        return
    record = {
        "preset": values.preset,
        "shape": _shape(values),
        "qk_clip_threshold": values.qk_clip_threshold,
        "world_size": world_size,
        "flags": flags,
    }
    write_record(Path(values.save) / RUN_RECORD, record)


def drop_damaged_index_cache(prefixes: list[str]) -> None:
    """Remove sample indices that a kill cut short; Megatron builds them again.

    It writes ``PREFIX/cache/*/*.npy`` in place and trusts whatever it finds there.
    """
    for path in (path for prefix in prefixes for path in Path(prefix).glob("cache/*/*.npy")):
        try:
            np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError):
            path.unlink(missing_ok=True)
