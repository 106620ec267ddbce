"""CPU twins: the same schedule, scaled down, on ``k2-tiny`` and one rank. Seconds each."""

from dataclasses import replace

from megatron_k2.launch.blend import DataBlend
from megatron_k2.launch.chat_blend import ChatBlend
from megatron_k2.launch.policies import CheckpointPolicy, LossPolicy
from megatron_k2.launch.recipe import Recipe
from megatron_k2.launch.stage import FineTuning, Pretraining, ReinforcementLearning, Stage
from megatron_k2.launch.task_data import TaskData
from megatron_k2.planning.gpus import Gpu
from megatron_k2.planning.phases import Phase, scaled_down
from megatron_k2.planning.request import RunRequest
from megatron_k2.planning.rl.request import EngineLayout
from megatron_k2.presets import K2_TINY

STEPS = 20
"""Steps of the longest phase."""
SEQ_LENGTH, SEQUENCES_PER_STEP = 64, 32
"""Shape of the first phase's batch: the 128k twin is then one sequence of 2,048 a step."""
DATA = "runs/synthetic"
"""Directory of the twins' corpora, which every twin shares."""
RL = Phase(
    name="rl",
    source="choice: a toy model's rate; too few steps for it to be seen to learn",
    tokens=6 * 32 * 128,
    seq_length=128,
    tokens_per_step=32 * 128,
    lr=2e-4,
    min_lr=2e-4,
    shape="constant",
)
"""Six iterations of eight prompts of four answers, of weights that know nothing."""
CPU = Gpu("cpu", "no data sheet: nothing is planned on it", 0, 0, 0, 0, 0, 0, 0)

SOURCES = (
    ("layout", "choice: one rank"),
    ("phase", f"phases.scaled_down to {STEPS} steps of {SEQ_LENGTH} x {SEQUENCES_PER_STEP} tokens"),
    ("precision", "choice: the CPU path's"),
    ("checkpoint", "choice: twice a run"),
    ("data", "the large recipe's blend, of small corpora or dialogues made on the spot"),
    ("keeps_optimizer", "as the large recipe"),
    ("dispatch", "gloo's all-to-all, of one rank"),
    ("profiler", "choice: off"),
    ("loss", "as the large recipe's"),
    ("stage", "as the large recipe's"),
    ("extra_flags", "choice: a line a step"),
)

RL_SOURCES = (
    ("phase", "recipes/cpu.py: choices"),
    ("data", "tasks that random weights pass now and then, and a tokenizer, made on the spot"),
    ("stage", "choice: four answers are a group"),
    ("loss", "a loss of RL has no level that could spike"),
    ("extra_flags", "choice: held-out tasks twice; random weights do not end an answer"),
)
"""Over ``SOURCES``."""
ALONE = ReinforcementLearning(group_size=4)
RL_CLUSTER_ITERATIONS = 3
RL_CLUSTER_SOURCES = (
    ("layout", "choice: four ranks, experts over two of them"),
    ("checkpoint", "choice: every iteration, so that a kill loses little"),
    ("extra_flags", "choice: the same bits whatever else is sampled, so that runs compare"),
)
"""Over both."""


def twins(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
    """``phases`` at the size of ``k2-tiny``."""
    return scaled_down(
        phases,
        steps=STEPS,
        seq_length=SEQ_LENGTH,
        sequences_per_step=SEQUENCES_PER_STEP,
        lr=K2_TINY.training.lr,
    )


def cpu_twin(
    name: str,
    phase: Phase,
    data: DataBlend | ChatBlend | TaskData,
    previous: str | None = None,
    imported: str | None = None,
    stage: Stage | None = None,
    lora_rank: int = 0,
) -> Recipe:
    """The recipe of a phase of ``twins``.

    Args:
        name: of the recipe.
        phase: already scaled down.
        data: a synthetic blend.
        previous: the twin whose checkpoint it starts from.
        imported: the weights it continues from, in words.
        stage: pretraining by default.
        lora_rank: of adapters over the weights it starts from; 0: all of them train.
    """
    is_packed = isinstance(stage, FineTuning | ReinforcementLearning)
    return Recipe(
        name=name,
        layout=RunRequest(
            preset=K2_TINY,
            gpu=CPU,
            world_size=1,
            seq_length=phase.seq_length,
            sequences_per_step=phase.sequences_per_step,
            micro_batch_size=1 if is_packed else min(8, phase.sequences_per_step),
            recompute=frozenset(),
            fp8_storage=False,
            has_overlap=False,
            lora_rank=lora_rank,
        ),
        phase=phase,
        precision="fp32",
        checkpoint=CheckpointPolicy(
            interval=max(1, phase.steps // 2),
            retain_interval=max(1, phase.steps // 2),
            asynchronous=False,
        ),
        data=data,
        loss=LossPolicy(stop_on_nonfinite=True, spike_margin=1),
        sources=SOURCES,
        differences=("size: a twin for the CPU; nothing of it but the curve's shape is K2's",),
        previous=previous,
        keeps_optimizer=previous is not None and not lora_rank,
        imported=imported,
        stage=stage or Pretraining(),
        extra_flags=("--log-interval", "1"),
    )


def rl_twin(name: str) -> Recipe:
    """Reinforcement learning from random weights, the engine in rank 0's own process.

    Args:
        name: of the recipe.
    """
    tasks = TaskData(DATA, "letters.json", "letters_tokenizer", is_synthetic=True)
    twin = cpu_twin(name, RL, tasks, stage=ALONE)
    return twin.replace(
        loss=LossPolicy(stop_on_nonfinite=True, on_spike="off"),
        sources=(*SOURCES, *RL_SOURCES),
        differences=("size: a twin for the CPU; its tasks ask for no knowledge",),
        extra_flags=(*twin.extra_flags, "--eval-every", "3", "--rail", "truncated=off"),
    )


def rl_cluster_twin(name: str) -> Recipe:
    """The same on four ranks, and two engines that are servers of their own, each on its "node".

    Args:
        name: of the recipe.
    """
    alone = rl_twin(name)
    engines = EngineLayout(
        replicas=2, nodes_per_replica=1, gpus_per_node=0, backend="local", is_fp8=False, slots=16
    )
    return alone.replace(
        layout=alone.layout.replace(world_size=4, ep=2),
        phase=replace(alone.phase, tokens=RL_CLUSTER_ITERATIONS * alone.phase.tokens_per_step),
        stage=replace(ALONE, engines=engines),
        checkpoint=CheckpointPolicy(interval=1, retain_interval=1, asynchronous=False),
        sources=(*alone.sources, *RL_CLUSTER_SOURCES),
        extra_flags=(*alone.extra_flags, "--batch-invariant"),
    )
