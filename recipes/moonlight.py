"""Moonlight-16B-A3B's pretraining on 8 to 64 GPUs: K2's algorithm at the size of a laboratory."""

from dataclasses import replace

from megatron_k2.launch.blend import DataBlend
from megatron_k2.launch.policies import CheckpointPolicy, LossPolicy
from megatron_k2.launch.recipe import Recipe
from megatron_k2.planning.gpus import get_gpu
from megatron_k2.planning.memory_fit import fit_to_memory
from megatron_k2.planning.phases import Phase
from megatron_k2.planning.request import RunRequest
from megatron_k2.presets import MOONLIGHT_16B_A3B

NUM_GPUS = (8, 16, 32, 64)
HARDWARE = ("h800", "h100", "h200")

_T = MOONLIGHT_16B_A3B.training

PRETRAIN = Phase(
    name="pretrain",
    source="the preset's: arXiv:2502.16982 section 3.3, 5.7T tokens as one run",
    tokens=_T.train_samples * _T.seq_length,
    seq_length=_T.seq_length,
    tokens_per_step=_T.seq_length * _T.global_batch_size,
    lr=_T.lr,
    min_lr=_T.min_lr,
    shape="wsd",
    warmup_tokens=_T.lr_warmup_samples * _T.seq_length,
    decay_tokens=_T.lr_wsd_decay_samples * _T.seq_length,
)

CONTINUE = replace(
    PRETRAIN,
    name="continue",
    source="choice: the end of the preset's schedule on published weights, after a warm-up",
    tokens=50 * 10**9,
    lr=PRETRAIN.lr / 10,
    min_lr=PRETRAIN.lr / 100,
    warmup_tokens=100 * PRETRAIN.tokens_per_step,
    decay_tokens=25 * 10**9,
)
"""More pretraining of Moonlight-16B-A3B on one's own data."""
RUNS = {"pretrain": PRETRAIN, "continue": CONTINUE}

DIFFERENCE = {
    "pretrain": (
        "schedule: one cosine over the last 5.2T of 5.7T tokens; the paper's stages (cosine from "
        "33B to 5.2T, then a last stage of its own) are not written down here"
    ),
    "continue": "schedule: not the paper's; momentum and moments start empty",
}

SOURCES = (
    ("layout", "planner: no pipeline, EP 8 within a node; not stated for Moonlight"),
    ("phase", "recipes/moonlight.py: arXiv:2502.16982 section 3.3, with the choices named there"),
    ("precision", "as K2's"),
    ("checkpoint", "choice: as K2's"),
    ("data", "not stated: one prefix, to be replaced"),
    ("loss", "choice: as K2's"),
    ("keeps_optimizer", "published weights have no optimizer state"),
    ("dispatch", "not stated; as K2's"),
    ("profiler", "choice: off"),
    ("extra_flags", "none"),
)


def moonlight_pretrain(num_gpus: int, gpu: str, phase: str = "pretrain") -> Recipe:
    """Moonlight's pretraining.

    Args:
        num_gpus: a multiple of 8.
        gpu: a name of ``planning/gpus.py``.
        phase: a key of ``RUNS``.

    Raises:
        UserError: where it does not fit.
    """
    return Recipe(
        name=name(num_gpus, gpu, phase),
        layout=fit_to_memory(
            RunRequest(
                preset=MOONLIGHT_16B_A3B,
                gpu=get_gpu(gpu),
                world_size=num_gpus,
                seq_length=RUNS[phase].seq_length,
                sequences_per_step=RUNS[phase].sequences_per_step,
                ep=8,
            )
        ),
        phase=RUNS[phase],
        precision="bf16",
        checkpoint=CheckpointPolicy(interval=500, retain_interval=10_000, asynchronous=False),
        data=DataBlend("data", (1.0,), ("train",)),
        loss=LossPolicy(stop_on_nonfinite=True),
        sources=SOURCES,
        differences=(DIFFERENCE[phase],),
        imported="Moonlight-16B-A3B" if phase == "continue" else None,
    )


def name(num_gpus: int, gpu: str, phase: str = "pretrain") -> str:
    """The name under which ``RECIPES`` has it, ``moonlight_16b_a3b_<phase>_<N>gpu_<hw>``."""
    return f"moonlight_16b_a3b_{phase}_{num_gpus}gpu_{gpu}"
