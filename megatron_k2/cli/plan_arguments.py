"""What ``megatron-k2 plan`` is asked: its flags, and the run and efficiencies they name."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_k2.planning.measured_rates import SelfcheckRecord
    from megatron_k2.planning.request import RunRequest

COUNTS = (
    "Elements, bytes of states and FLOPs are exact; activations are the sum of what Megatron's "
    "Transformer Engine modules keep, with evenly loaded experts; seconds are FLOPs and bytes over "
    "the data sheet's rates times the efficiencies above"
)
NOTE = f"{COUNTS}, which are assumptions (--efficiency). Nothing here was measured on a GPU."
MEASURED_NOTE = f"{COUNTS}, assumptions but for those used as measured (--calibrate)."


def parser() -> argparse.ArgumentParser:
    """The flags of ``megatron-k2 plan``."""
    found = argparse.ArgumentParser(
        prog="megatron-k2 plan",
        description="Memory, time and layout of a run. Also: plan schedule, plan optimizer. "
        + NOTE,
    )
    found.add_argument("--preset", required=True, help="see: megatron-k2 presets")
    found.add_argument(
        "--gpu", default="h800", help="h100, h200, h800 (default), b200; cpu with --calibrate"
    )
    found.add_argument("--gpu-memory-gb", type=float, help="instead of the data sheet's")
    found.add_argument("--gpu-tflops", type=float, help="dense bf16, instead of the data sheet's")
    found.add_argument("--world-size", type=int, required=True, help="GPUs")
    _add_batch(found)
    _add_layout(found)
    _add_memory(found)
    found.add_argument(
        "--efficiency",
        default="",
        metavar="gemm=0.65,…",
        help="parts of the data sheet's rates: gemm, grouped, attention, network; elementwise adds",
    )
    found.add_argument(
        "--calibrate",
        metavar="selfcheck.json",
        help="rates measured on that GPU in place of assumed efficiencies; both are printed",
    )
    found.add_argument("--tokens", type=float, help="of the whole run (default: the preset's)")
    found.add_argument("--search", action="store_true", help="rank every layout of these GPUs")
    found.add_argument("--top", type=int, default=10, help="layouts shown by --search")
    found.add_argument(
        "--dry-run",
        action="store_true",
        help="build every distinct rank at full size on the meta device; flags after -- go along",
    )
    found.add_argument("--print-args", action="store_true", help="the plan as Megatron's flags")
    found.add_argument("--json", action="store_true", help="machine-readable")
    found.add_argument("--trace", metavar="FILE", help="Chrome/Perfetto trace of one step")
    found.add_argument("--png", metavar="FILE", help="the same step drawn, and the memory")
    return found


def _add_batch(found: argparse.ArgumentParser) -> None:
    batch = found.add_argument_group("batch (default: the preset's)")
    batch.add_argument("--seq-length", type=int, help="tokens")
    batch.add_argument("--sequences-per-step", type=int, help="global batch size")
    batch.add_argument("--micro-batch-size", type=int, default=1, help="sequences")
    batch.add_argument(
        "--document-tokens",
        type=int,
        default=0,
        help="packed documents, as fine-tuning has them: tokens that attention reaches over",
    )
    batch.add_argument(
        "--lora-rank",
        type=int,
        default=0,
        help="adapters of this rank on every linear, over frozen weights (default: all trains)",
    )
    batch.add_argument(
        "--lora-base-fp8", action="store_true", help="the frozen linears are held in block FP8"
    )


def _add_layout(found: argparse.ArgumentParser) -> None:
    layout = found.add_argument_group("layout (default: the report's PP 16 x EP 16)")
    layout.add_argument("--tp", type=int, default=1)
    layout.add_argument("--pp", type=int, default=16)
    layout.add_argument("--vpp", type=int, default=2, help="virtual stages (report: not stated)")
    layout.add_argument("--ep", type=int, default=16)
    layout.add_argument("--cp", type=int, default=1)


def _add_memory(found: argparse.ArgumentParser) -> None:
    memory = found.add_argument_group("memory (report, section 2.4.4)")
    memory.add_argument(
        "--transformer-impl",
        choices=["transformer_engine", "local"],
        default="transformer_engine",
        help="whose modules: they keep different tensors for their backward",
    )
    memory.add_argument(
        "--recompute",
        help="of norm, swiglu, mla_up; or none (default: all three; local: the first two)",
    )
    memory.add_argument("--no-fp8-storage", action="store_true", help="activations stay bf16")
    memory.add_argument(
        "--activation-offload", default="auto", help="part on the host, or auto: as much as needed"
    )
    memory.add_argument("--optimizer-offload", default="auto", help="likewise, after activations")
    memory.add_argument("--no-overlap", action="store_true", help="expert all-to-all not hidden")


def request_from(
    arguments: argparse.Namespace, record: "SelfcheckRecord | None" = None
) -> "RunRequest":
    """The run that was typed, before anything is fitted to memory.

    Args:
        arguments: what was typed.
        record: what was measured on the GPU, ``None`` where nothing was.
    """
    from dataclasses import replace

    from megatron_k2.planning.calibration import planned_gpu
    from megatron_k2.planning.gpus import get_gpu
    from megatron_k2.planning.request import RunRequest
    from megatron_k2.presets import get_preset

    preset = get_preset(arguments.preset)
    gpu = planned_gpu(arguments.gpu, record) or get_gpu(arguments.gpu)
    if arguments.gpu_memory_gb:
        gpu = replace(gpu, memory_gb=arguments.gpu_memory_gb)
    if arguments.gpu_tflops:
        gpu = replace(gpu, bf16_tflops=arguments.gpu_tflops)
    everything = "norm,swiglu" if arguments.transformer_impl == "local" else "norm,swiglu,mla_up"
    names: Any = (arguments.recompute or everything).replace(" ", "").split(",")
    return RunRequest(
        preset=preset,
        gpu=gpu,
        world_size=arguments.world_size,
        seq_length=arguments.seq_length or preset.training.seq_length,
        sequences_per_step=arguments.sequences_per_step or preset.training.global_batch_size,
        tp=arguments.tp,
        pp=arguments.pp,
        vpp=arguments.vpp if arguments.pp > 1 else 1,
        ep=arguments.ep,
        cp=arguments.cp,
        micro_batch_size=arguments.micro_batch_size,
        document_tokens=arguments.document_tokens,
        lora_rank=arguments.lora_rank,
        lora_base_fp8=arguments.lora_base_fp8,
        recompute=frozenset() if names == ["none"] else frozenset(names),
        fp8_storage=not (arguments.no_fp8_storage or arguments.lora_base_fp8),
        modules=arguments.transformer_impl,
        has_overlap=not arguments.no_overlap,
    )


def fraction(field: str, value: str) -> float:
    """What was typed for the flag of ``field``."""
    from megatron_k2.errors import UserError

    try:
        return float(value)
    except ValueError:
        flag = "--" + field.replace("_", "-")
        raise UserError(f"{flag} {value}: a fraction from 0 to 1, or auto, is expected") from None


def typed_efficiencies(text: str) -> dict[str, float]:
    """``gemm=0.7,network=0.8`` by name.

    Raises:
        UserError: for an unknown name or a value that is not a positive number.
    """
    from dataclasses import fields

    from megatron_k2.errors import UserError
    from megatron_k2.planning.estimate import Assumptions

    known = [field.name for field in fields(Assumptions)]
    changes = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, value = part.partition("=")
        if name not in known:
            raise UserError(f"--efficiency {name}: expected one of {', '.join(known)}")
        try:
            changes[name] = float(value)
        except ValueError:
            raise UserError(f"--efficiency {part}: expected {name}=NUMBER") from None
        if changes[name] <= 0:
            raise UserError(f"--efficiency {part}: a number above 0 is expected")
    return changes
