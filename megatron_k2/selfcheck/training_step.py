"""Step: a few steps of ``k2-mini`` in bf16 by the real program, beside the planner's figures.

On a CPU it is ``k2-tiny`` in fp32, which no plan was made for: tokens a second are shown alone.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from megatron_k2.planning.calibration import gpu_called
from megatron_k2.planning.cost.flops import model_flops_per_token
from megatron_k2.planning.cost.memory import RESERVED_GB
from megatron_k2.planning.estimate import Estimate, estimate
from megatron_k2.planning.gpus import Gpu
from megatron_k2.planning.request import RunRequest
from megatron_k2.presets import K2_MINI, K2_TINY, ModelPreset
from megatron_k2.run.metrics import METRICS_FILE
from megatron_k2.selfcheck.findings import Figure, Findings, judged

STEPS, SKIPPED = {"full": 12, "small": 4}, 2
"""Steps, and how many at the start are not timed: kernels are compiled and clocks rise."""
SEQUENCES, MICRO_BATCH = 32, 8


def measure(device: str, workload: str) -> Findings:
    """Train, then read what the run says of itself."""
    preset = K2_MINI if device == "cuda" else K2_TINY
    with tempfile.TemporaryDirectory() as folder:
        losses, seconds = _train(preset, device, Path(folder), STEPS[workload])
    sequences = SEQUENCES if device == "cuda" else preset.training.global_batch_size
    tokens = sequences * preset.training.seq_length / statistics.median(seconds[SKIPPED:])
    figures = [
        Figure(f"loss of step {len(losses)} over that of step 1", losses[-1] / losses[0], bar=1.0)
    ]
    note = f"{preset.name}, {sequences} x {preset.training.seq_length} tokens a step"
    if device == "cpu":
        return judged(note, [*figures, Figure("tokens a second", tokens)])
    return _beside_the_plan(note, figures, tokens)


def _train(
    preset: ModelPreset, device: str, folder: Path, steps: int
) -> tuple[list[float], list[float]]:
    """(loss, seconds) of each step."""
    from megatron_k2.training.pretrain import run

    gpu = (
        f"--bf16 --use-distributed-optimizer --micro-batch-size {MICRO_BATCH} "
        f"--global-batch-size {SEQUENCES}"
    )
    words = (
        f"--preset {preset.name} --mock-data --tokenizer-type NullTokenizer --no-save-optim "
        f"--vocab-size {preset.vocab_size} --train-iters {steps} --eval-iters 0 --save-interval "
        f"{10 * steps} --console megatron {gpu if device == 'cuda' else ''}"
    )
    sys.argv = ["pretrain"]
    run([*words.split(), "--save", str(folder)])
    lines = (folder / METRICS_FILE).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [r["loss"] for r in records], [r["seconds"] for r in records]


def _plan(gpu: Gpu) -> Estimate:
    request = RunRequest(
        tp=1,
        pp=1,
        cp=1,
        ep=1,
        vpp=1,
        world_size=1,
        preset=K2_MINI,
        gpu=gpu,
        seq_length=K2_MINI.training.seq_length,
        sequences_per_step=SEQUENCES,
        micro_batch_size=MICRO_BATCH,
        recompute=frozenset(),
        fp8_storage=False,
        modules="local",
        has_overlap=False,
    )
    return estimate(request)


def _beside_the_plan(note: str, figures: list[Figure], tokens: float) -> Findings:
    peak = torch.cuda.max_memory_allocated()
    gpu = gpu_called(torch.cuda.get_device_name())
    flops = model_flops_per_token(K2_MINI, K2_MINI.training.seq_length)
    figures.append(Figure("model FLOPs", flops * tokens / 1e12, "TFLOP/s"))
    if gpu is None:
        figures += [Figure("tokens a second", tokens), Figure("peak memory", peak / 1e9, "GB")]
        return judged(f"{note}; the planner does not know this GPU", figures)
    plan = _plan(gpu)
    predicted = plan.memory[0].total - RESERVED_GB * 1e9
    figures += [
        Figure("tokens a second", tokens, "", None, plan.tokens_per_second, "planned"),
        Figure("peak memory", peak / 1e9, "GB", None, predicted / 1e9, "GB planned"),
    ]
    step = {
        "preset": K2_MINI.name,
        "tokens_per_s": tokens,
        "model_flops_per_token": flops,
        "peak_bytes": peak,
        "predicted_peak_bytes": int(predicted),
        "planned_tokens_per_s": plan.tokens_per_second,
    }
    return judged(note, figures, {"train_step": step})
