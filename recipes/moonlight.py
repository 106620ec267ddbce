"""Moonlight-16B-A3B on 8 to 64 GPUs, both stages: K2's algorithm at the size of a laboratory."""

from dataclasses import replace

from megatron_k2.launch.blend import DataBlend
from megatron_k2.launch.chat_blend import ChatBlend
from megatron_k2.launch.policies import CheckpointPolicy, LossPolicy
from megatron_k2.launch.recipe import Recipe
from megatron_k2.launch.stage import FineTuning
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

SFT = Phase(
    name="sft",
    source="arXiv:2502.16982, fine-tuning with Muon after Muon: 5e-5 to 0; the rest is a choice",
    tokens=2000 * 64 * _T.seq_length,
    seq_length=_T.seq_length,
    tokens_per_step=64 * _T.seq_length,
    lr=5e-5,
    min_lr=0.0,
    shape="wsd",
    warmup_tokens=10 * 64 * _T.seq_length,
    decay_tokens=1990 * 64 * _T.seq_length,
)
"""Fine-tuning on packed dialogues."""
LORA = replace(
    SFT,
    name="lora",
    source="choice: the paper has no adapters; ten times full fine-tuning's rate, as adapters want "
    "(thinkingmachines.ai/blog/lora)",
    lr=5e-4,
    min_lr=5e-5,
)
"""Adapters on packed dialogues."""
LORA_RANK = 32
"""Ours."""
SFT_DOCUMENT_TOKENS = 1024
"""What attention is planned for; ours."""

DIFFERENCE = {
    "pretrain": (
        "schedule: one cosine over the last 5.2T of 5.7T tokens; the paper's stages (cosine from "
        "33B to 5.2T, then a last stage of its own) are not written down here"
    ),
    "continue": "schedule: not the paper's; momentum and moments start empty",
}

SFT_SOURCES = (
    ("layout.document_tokens", "choice: recipes/moonlight.py"),
    ("phase", "recipes/moonlight.py: arXiv:2502.16982's rates, with the choices named there"),
    ("layout.lora_rank", "choice: recipes/moonlight.py"),
    ("data", "yours: megatron-k2 data chat"),
    ("stage", "choice: every target weighs the same; not stated"),
    ("keeps_optimizer", "choice: momentum of another loss is left behind"),
)
"""Over ``SOURCES``, where both have a key."""
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


def moonlight_sft(num_gpus: int, gpu: str, *, has_adapters: bool = False) -> Recipe:
    """Moonlight's fine-tuning, of all weights or of adapters.

    Args:
        num_gpus: a multiple of 8.
        gpu: a name of ``planning/gpus.py``.
        has_adapters: over weights that are frozen.

    Raises:
        UserError: where it does not fit.
    """
    phase = LORA if has_adapters else SFT
    layout = RunRequest(
        preset=MOONLIGHT_16B_A3B,
        gpu=get_gpu(gpu),
        world_size=num_gpus,
        seq_length=phase.seq_length,
        sequences_per_step=phase.sequences_per_step,
        ep=8,
        document_tokens=SFT_DOCUMENT_TOKENS,
        lora_rank=LORA_RANK if has_adapters else 0,
        has_overlap=not has_adapters,
    )
    return Recipe(
        name=name(num_gpus, gpu, phase.name),
        layout=fit_to_memory(layout),
        phase=phase,
        precision="bf16",
        checkpoint=CheckpointPolicy(interval=200, retain_interval=1000, asynchronous=False),
        data=ChatBlend("data", (1.0,), ("chat",)),
        loss=LossPolicy(stop_on_nonfinite=True),
        stage=FineTuning(),
        sources=(*SOURCES, *SFT_SOURCES),
        differences=(
            "schedule: the paper's data and batch are not written down here; length is a choice",
            "published weights: megatron-k2 convert import Moonlight-16B-A3B DIR, --start-from DIR",
        ),
        previous=name(num_gpus, gpu),
    )


def name(num_gpus: int, gpu: str, phase: str = "pretrain") -> str:
    """The name under which ``RECIPES`` has it, ``moonlight_16b_a3b_<phase>_<N>gpu_<hw>``."""
    return f"moonlight_16b_a3b_{phase}_{num_gpus}gpu_{gpu}"
