"""Kimi K2's pretraining, the report's four phases on 256 to 2048 GPUs, and its fine-tuning.

Layout PP 16 x EP 16 and ZeRO-1 are the report's (section 2.4.2), chosen there so that the same one
serves any multiple of 32 nodes. Offload is the planner's: the least that fits.
"""

from megatron_k2.launch.chat_blend import ChatBlend
from megatron_k2.launch.policies import CheckpointPolicy, LossPolicy
from megatron_k2.launch.recipe import Recipe
from megatron_k2.launch.stage import FineTuning
from megatron_k2.planning.gpus import get_gpu
from megatron_k2.planning.memory_fit import fit_to_memory
from megatron_k2.planning.phases import Phase, kimi_k2_phases
from megatron_k2.planning.request import RunRequest
from megatron_k2.presets import K2_TOKENS_PER_STEP, KIMI_K2
from megatron_k2.recipes.blends import SOURCES as DATA_SOURCES
from megatron_k2.recipes.blends import blend_of

PHASES = {phase.name.replace("-", "_"): phase for phase in kimi_k2_phases()}
"""As recipes spell them: pretrain, anneal_4k, long_32k, yarn_128k."""
CONTINUE = Phase(
    name="continue",
    source="choice: report 2.5's annealing on published weights, with a warm-up for empty momentum",
    tokens=100 * 10**9,
    seq_length=4096,
    tokens_per_step=K2_TOKENS_PER_STEP,
    lr=2e-5,
    min_lr=7e-6,
    shape="wsd",
    warmup_tokens=100 * K2_TOKENS_PER_STEP,
    decay_tokens=50 * 10**9,
)
"""More pretraining of Kimi-K2-Base on one's own data."""
RUNS = PHASES | {"continue": CONTINUE}
SFT_TOKENS_PER_STEP = 128 * 32768
SFT = Phase(
    name="sft",
    source="choice: K2's fine-tuning has no published figure; for weights that Muon pretrained a "
    "tenth of the pretraining's rate, falling to a hundredth",
    tokens=1000 * SFT_TOKENS_PER_STEP,
    seq_length=32768,
    tokens_per_step=SFT_TOKENS_PER_STEP,
    lr=2e-5,
    min_lr=2e-6,
    shape="wsd",
    warmup_tokens=10 * SFT_TOKENS_PER_STEP,
    decay_tokens=990 * SFT_TOKENS_PER_STEP,
    has_yarn=True,
)
"""Fine-tuning on packed dialogues, 4M rows a step."""
LORA_TOKENS_PER_STEP = 64 * 8192
LORA = Phase(
    name="lora",
    source="choice: K2's report has no adapters; ten times full fine-tuning's rate, as adapters "
    "want (thinkingmachines.ai/blog/lora), falling to a tenth",
    tokens=2000 * LORA_TOKENS_PER_STEP,
    seq_length=8192,
    tokens_per_step=LORA_TOKENS_PER_STEP,
    lr=2e-4,
    min_lr=2e-5,
    shape="wsd",
    warmup_tokens=10 * LORA_TOKENS_PER_STEP,
    decay_tokens=1990 * LORA_TOKENS_PER_STEP,
    has_yarn=True,
)
"""Adapters on packed dialogues, half a million rows a step."""
LORA_RANK = 32
"""Ours: 15 billion parameters of a trillion."""
SFT_DOCUMENT_TOKENS = 4096
"""What attention is planned for; dialogues with tools are longer than the thousand of chat alone.
Ours."""
NUM_GPUS = (256, 512, 1024, 2048)
"""Report 2.4.2: any multiple of 32 nodes of eight."""
SFT_NUM_GPUS = (256, 512, 1024)
HARDWARE = ("h800", "h100", "h200")
LORA_SIZES = (*((n, gpu) for n in (64, 128) for gpu in HARDWARE), (32, "h200"))
"""Frozen weights in bf16 are 2 TB: 32 GPUs of 141 GB hold them and train, 24 do not (planner)."""

SFT_SOURCES = (
    ("layout.document_tokens", "choice: recipes/kimi_k2.py"),
    ("phase", "recipes/kimi_k2.py: choices; Muon after Muon as Moonlight (arXiv:2502.16982)"),
    ("checkpoint", "choice: ten a run, two of them kept"),
    ("checkpoint.interval", "choice: ten a run"),
    ("checkpoint.retain_interval", "choice: every 500 steps, for good"),
    ("data", "yours: megatron-k2 data chat"),
    ("stage.average", "choice: every target weighs the same; not stated for K2"),
    ("keeps_optimizer", "choice: momentum of another loss is left behind"),
    ("loss.iterations_to_skip", "none"),
)
"""Over ``SOURCES``, where both have a key."""
LORA_SOURCES = (
    ("layout", "planner: the fewest stages whose weights and activations fit"),
    ("layout.lora_rank", "choice: recipes/kimi_k2.py"),
    ("phase", "recipes/kimi_k2.py: choices"),
)
"""Over ``SFT_SOURCES``."""
SOURCES = (
    ("layout.world_size", "the recipe's name; report 2.4.2: any multiple of 32 nodes"),
    ("layout.tp", "report 2.4.2 names none; planner: 4 at 128k where a GPU has 80 GB"),
    ("layout.pp", "report 2.4.2: PP 16 x EP 16, ZeRO-1; the rest is the planner's"),
    ("layout.vpp", "report 2.4.2: number not stated; planner: 2"),
    ("layout.ep", "report 2.4.2: 16"),
    ("layout.cp", "not stated; planner: a node's 8 GPUs at 32k and 128k, or 4 beside TP 4"),
    ("layout.micro_batch_size", "not stated; planner: 1"),
    ("layout.document_tokens", "0: pretraining attends over whole rows"),
    ("layout.lora_rank", "0: the report trains every weight"),
    ("layout.lora_base_fp8", "choice: a frozen base in bf16, as it was trained"),
    ("layout.recompute", "report 2.4.4, item 1"),
    ("layout.fp8_storage", "report 2.4.4, item 2"),
    ("layout.activation_offload", "planner; report 2.4.4, item 3: all of them"),
    ("layout.optimizer_offload", "planner: behind the activations; report 2.4.2: on few nodes"),
    ("layout.has_overlap", "report 2.4.2: interleaved 1F1B with expert parallel overlap"),
    ("phase", "planning/phases.py: report 2.5, with the choices named there"),
    ("precision", "report 2.4.2: weights bf16, gradients fp32"),
    ("checkpoint.interval", "choice: about three hours at 256 GPUs, half an hour at 2048"),
    ("checkpoint.retain_interval", "choice: every 10,000 steps, 0.67T tokens, for good"),
    ("checkpoint.asynchronous", "choice: exact resume is tested with synchronous saves only"),
    (
        "dispatch",
        "report 2.4.2: expert all-to-all, hidden behind arithmetic; DeepEP is not named there",
    ),
    (
        "keeps_optimizer",
        "assumption: report 2.5's rate has no jump between phases; its state is not stated",
    ),
    ("loss.stop_on_nonfinite", "choice: a bad step is looked at by a person"),
    ("loss.iterations_to_skip", "report 2.1: no spike in 15.5T tokens, none to skip"),
    ("loss.on_spike", "choice: report 2.1 saw no spike, so a first one is looked at by a person"),
    ("loss.spike_nats", "choice: far above the noise of 67M tokens a step"),
    ("loss.spike_margin", "choice; PaLM (arXiv:2204.02311, 5.1) left out 200 to 500 batches"),
    ("profiler", "choice: off; a trace costs time and disk"),
    ("extra_flags", "none"),
)


def kimi_k2_pretrain(num_gpus: int, gpu: str, phase: str) -> Recipe:
    """One phase of the report's pretraining.

    Args:
        num_gpus: a multiple of 256.
        gpu: a name of ``planning/gpus.py``.
        phase: a key of ``RUNS``.

    Raises:
        UserError: where it does not fit.
    """
    names = list(PHASES)
    before = names[names.index(phase) - 1] if phase in names[1:] else None
    layout = _layout(num_gpus, gpu, RUNS[phase])
    return Recipe(
        name=name(phase, num_gpus, gpu),
        layout=layout,
        phase=RUNS[phase],
        precision="bf16",
        checkpoint=CheckpointPolicy(interval=100, retain_interval=10_000, asynchronous=False),
        data=blend_of(phase, "data"),
        loss=LossPolicy(stop_on_nonfinite=True),
        sources=(*SOURCES, *DATA_SOURCES[phase]),
        differences=_differences(RUNS[phase]),
        previous=name(before, num_gpus, gpu) if before else None,
        keeps_optimizer=before is not None,
        imported="Kimi-K2-Base" if phase == "continue" else None,
    )


def kimi_k2_sft(num_gpus: int, gpu: str) -> Recipe:
    """Fine-tuning of the released base, or of the last phase's weights.

    Args:
        num_gpus: of ``SFT_NUM_GPUS``.
        gpu: a name of ``planning/gpus.py``.

    Raises:
        UserError: where it does not fit.
    """
    layout = _layout(num_gpus, gpu, SFT, SFT_DOCUMENT_TOKENS)
    return Recipe(
        name=name("sft", num_gpus, gpu),
        layout=layout,
        phase=SFT,
        precision="bf16",
        checkpoint=CheckpointPolicy(interval=100, retain_interval=500, asynchronous=False),
        data=ChatBlend("data", (1.0,), ("chat",)),
        loss=LossPolicy(stop_on_nonfinite=True),
        stage=FineTuning(),
        sources=(*SOURCES, *SFT_SOURCES),
        differences=(
            "not reported: K2's fine-tuning data, length, batch and rate; every one is a choice",
            "published weights: megatron-k2 convert import Kimi-K2-Base DIR, then --start-from DIR",
        ),
        previous=name("yarn_128k", num_gpus, gpu),
    )


def kimi_k2_lora(num_gpus: int, gpu: str) -> Recipe:
    """Adapters over the released weights, on the smallest cluster that holds them.

    Eight stages, experts over all GPUs of a stage: the most that divides both the weights and
    their activations; long rows over two GPUs. Without overlap, which has little to hide: a frozen
    weight has no gradient of its own to compute beside the all-to-all.

    Args:
        num_gpus: and
        gpu: of ``LORA_SIZES``.

    Raises:
        UserError: where it does not fit.
    """
    layout = RunRequest(
        preset=KIMI_K2,
        gpu=get_gpu(gpu),
        world_size=num_gpus,
        seq_length=LORA.seq_length,
        sequences_per_step=LORA.sequences_per_step,
        pp=8,
        ep=num_gpus // 8,
        cp=2,
        lora_rank=LORA_RANK,
        document_tokens=SFT_DOCUMENT_TOKENS,
        has_overlap=False,
    )
    return Recipe(
        name=name("lora", num_gpus, gpu),
        layout=fit_to_memory(layout),
        phase=LORA,
        precision="bf16",
        checkpoint=CheckpointPolicy(interval=200, retain_interval=1000, asynchronous=False),
        data=ChatBlend("data", (1.0,), ("chat",)),
        loss=LossPolicy(stop_on_nonfinite=True),
        stage=FineTuning(),
        sources=(*SOURCES, *SFT_SOURCES, *LORA_SOURCES),
        differences=(
            "not reported: K2 has no adapters; every figure is a choice",
            "published weights: megatron-k2 convert import Kimi-K2-Base DIR, then --start-from DIR",
            "QK-Clip is off: it would scale rows of the frozen weights",
        ),
    )


def chain(where: str) -> tuple[str, ...]:
    """Names of all phases' recipes, in order; ``where`` as ``256gpu_h800`` or ``cpu``."""
    return tuple(f"kimi_k2_{phase}_{where}" for phase in PHASES)


def name(phase: str, num_gpus: int, gpu: str) -> str:
    """The name under which ``RECIPES`` has it, ``kimi_k2_<phase>_<N>gpu_<hw>``."""
    return f"kimi_k2_{phase}_{num_gpus}gpu_{gpu}"


def _layout(num_gpus: int, gpu: str, phase: Phase, document_tokens: int = 0) -> RunRequest:
    """The report's layout; long sequences are split, of which it says nothing.

    Over the GPUs of a node; at 128k over two nodes where a GPU has 80 GB, half of it by tensor
    parallelism: with CP 16 more of the ring would cross the network (planner: half the rate).
    """
    tp, cp = (1, 1) if phase.seq_length == 4096 else (1, 8)
    if phase.seq_length > 32768 and get_gpu(gpu).memory_gb <= 80:
        tp, cp = 4, 4
    return fit_to_memory(
        RunRequest(
            preset=KIMI_K2,
            gpu=get_gpu(gpu),
            world_size=num_gpus,
            seq_length=phase.seq_length,
            sequences_per_step=phase.sequences_per_step,
            pp=16,
            vpp=2,
            ep=16,
            tp=tp,
            cp=cp,
            document_tokens=document_tokens,
        )
    )


def _differences(phase: Phase) -> tuple[str, ...]:
    found = [
        "data: the report gives no weights of its four domains, and no change of them by phase; "
        "recipes/blends.py says what was assumed"
    ]
    if phase.name != "pretrain":
        found.append(f"schedule: {phase.source}")
    return tuple(found)
