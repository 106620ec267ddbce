"""Reinforcement learning of Kimi K2 on 256 to 1024 GPUs, and of Moonlight on 16 to 64.

Neither's report has numbers for it. What peers' recipes state is taken from them: slime's
run-kimi-k2-Instruct.sh and run-moonlight-16B-A3B.sh (commits 57f3c59, 4a2812e), which Miles keeps;
OpenKimi (arXiv:2602.05933) takes 512 prompts of 16 answers. Engines are the planner's: as few nodes
a replica as hold weights and cache beside what a sleeping trainer keeps.
"""

from dataclasses import replace

from megatron_k2.launch.policies import CheckpointPolicy, LossPolicy
from megatron_k2.launch.recipe import Recipe
from megatron_k2.launch.stage import ReinforcementLearning
from megatron_k2.launch.task_data import TaskData
from megatron_k2.planning.gpus import GPUS_PER_NODE, get_gpu
from megatron_k2.planning.memory_fit import fit_to_memory
from megatron_k2.planning.phases import Phase
from megatron_k2.planning.request import RunRequest
from megatron_k2.planning.rl.fit import fewest_nodes
from megatron_k2.planning.rl.iteration import reserved_gb
from megatron_k2.planning.rl.request import EngineLayout, RlRequest
from megatron_k2.presets import KIMI_K2, MOONLIGHT_16B_A3B

K2_NUM_GPUS = (256, 512, 1024)
MOONLIGHT_NUM_GPUS = (16, 32, 64)
ITERATIONS, PROMPTS, ANSWERS, MINI_BATCHES = 100, 128, 8, 4
LR = 1e-6
ROOM = 4 / 3
"""Slots over the answers in play, so that none waits for one. Ours."""


def _phase(seq_length: int, *, has_yarn: bool) -> Phase:
    answers = PROMPTS * ANSWERS // MINI_BATCHES
    return Phase(
        name="rl",
        source="slime: 1e-6, constant, 100 rollouts of 128 prompts of 8 answers, 4 steps each",
        tokens=ITERATIONS * MINI_BATCHES * answers * seq_length,
        seq_length=seq_length,
        tokens_per_step=answers * seq_length,
        lr=LR,
        min_lr=LR,
        shape="constant",
        has_yarn=has_yarn,
    )


RELEASE = {
    "kimi-k2": "Kimi-K2-Instruct",
    "moonlight-16b-a3b": "Moonlight-16B-A3B-Instruct",
}
"""Directory of the release, of which engines take the configuration and no weights."""
K2 = _phase(32768, has_yarn=True)
MOONLIGHT = _phase(8192, has_yarn=False)

SOURCES = (
    ("layout", "slime: TP 8, PP 8, CP 4, EP 32 on 256 GPUs; more are data parallel"),
    ("layout.world_size", "the recipe's name"),
    ("layout.micro_batch_size", "a pack fills its row (docs/rl.md)"),
    ("layout.document_tokens", "the lengths of stage.*: mean square over mean"),
    ("layout.recompute", "report 2.4.4, item 1; slime computes whole layers again"),
    ("layout.fp8_storage", "report 2.4.4, item 2"),
    ("layout.activation_offload", "planner: what engines keep asleep is left free"),
    ("layout.optimizer_offload", "planner: behind the activations"),
    ("layout.has_overlap", "refused in RL: its schedule takes no log-probabilities for a loss"),
    ("phase", "slime: see phase.source; prompt and answer share a pack of 32,768"),
    ("precision", "report 2.4.2: weights bf16, gradients fp32"),
    ("checkpoint", "choice: more often than slime's 20, which are kept"),
    ("checkpoint.interval", "choice: in iterations; five are trained again at most"),
    ("checkpoint.retain_interval", "slime: every 20 iterations"),
    ("checkpoint.asynchronous", "refused in RL: groups are committed with the checkpoint"),
    ("data", "yours: task sets (docs/rl.md), K2's tokenizer"),
    ("loss", "a loss of RL has no level that could spike"),
    ("keeps_optimizer", "choice: momentum of another loss is left behind"),
    ("dispatch", "as pretraining's; slime takes DeepEP (dispatch.dispatcher=flex)"),
    ("profiler", "choice: off"),
    ("extra_flags", "slime: held-out tries every 20 iterations"),
    ("stage.group_size", "slime: 8 answers; OpenKimi 16"),
    ("stage.mini_batches", "slime: 4 steps a rollout"),
    ("stage.groups_in_play", "choice: half as many again as end an iteration (0)"),
    ("stage.prompt_tokens", "choice: not stated; for the plan alone"),
    ("stage.median_tokens", "choice: not stated; for the plan alone"),
    ("stage.sigma", "choice: not stated; for the plan alone"),
    ("stage.judged", "choice: task sets say which; for the plan alone"),
    ("stage.engines", "planner"),
    ("stage.engines.replicas", "planner: what is left of the GPUs"),
    (
        "stage.engines.nodes_per_replica",
        "planner: the fewest that hold weights and cache; Moonshot's guide names 16 GPUs of an "
        "H200 or H20 as the least",
    ),
    ("stage.engines.gpus_per_node", "report 2.4.1"),
    ("stage.engines.tp", "choice: data parallel attention; the cache of a latent is not split"),
    ("stage.engines.backend", "choice: vLLM, as Moonshot's guide; sglang is untested here"),
    ("stage.engines.is_colocated", "slime: --colocate"),
    ("stage.engines.is_fp8", "the release's own form, block FP8"),
    ("stage.engines.slots", "choice: a third more than the answers in play, over the replicas"),
)
MOONLIGHT_SOURCES = (
    ("layout", "slime: TP 4, EP 8; more GPUs are data parallel"),
    ("phase", "slime: see phase.source; its answers have 4,096 tokens, a pack here 8,192"),
    ("stage.engines.nodes_per_replica", "slime: engines of 8 GPUs"),
    ("stage.engines.is_fp8", "the release's own form, bf16"),
    ("layout.fp8_storage", "choice: off, it fits without"),
)
"""Over ``SOURCES``, where both have a key."""

DIFFERENCES = (
    "not reported: the report's RL has no batch, rate, length or number of steps; peers' are taken",
    "optimizer: slime and Miles train with Adam; MuonClip is the report's",
)
FP8_DIFFERENCE = (
    "not wired: weights of block FP8 reach no engine by an update yet (docs/weights.md), and these "
    "engines hold it; in bf16 (stage.engines.is_fp8=false) a replica takes twice the nodes"
)
FILES_DIFFERENCE = (
    "not wired: the update that is planned is the report's broadcast; today's goes as files over "
    "the run's disk (docs/rl.md)"
)


def kimi_k2_rl(num_gpus: int, gpu: str) -> Recipe:
    """K2 from a fine-tuned checkpoint, engines on the same GPUs.

    Args:
        num_gpus: of ``K2_NUM_GPUS``.
        gpu: a name of ``planning/gpus.py``.

    Raises:
        UserError: where it does not fit.
    """
    layout = RunRequest(
        preset=KIMI_K2,
        gpu=get_gpu(gpu),
        world_size=num_gpus,
        seq_length=K2.seq_length,
        sequences_per_step=K2.sequences_per_step,
        tp=8,
        pp=8,
        cp=4,
        ep=32,
        has_overlap=False,
    )
    stage = ReinforcementLearning(group_size=ANSWERS, mini_batches=MINI_BATCHES)
    return _recipe(name("kimi_k2", num_gpus, gpu), K2, layout, stage, is_fp8=True).replace(
        sources=SOURCES,
        differences=(*DIFFERENCES, FP8_DIFFERENCE, FILES_DIFFERENCE),
        previous=f"kimi_k2_sft_{num_gpus}gpu_{gpu}",
    )


def moonlight_rl(num_gpus: int, gpu: str) -> Recipe:
    """Moonlight from a fine-tuned checkpoint, an engine a node on the same GPUs.

    Args:
        num_gpus: of ``MOONLIGHT_NUM_GPUS``.
        gpu: a name of ``planning/gpus.py``.

    Raises:
        UserError: where it does not fit.
    """
    layout = RunRequest(
        preset=MOONLIGHT_16B_A3B,
        gpu=get_gpu(gpu),
        world_size=num_gpus,
        seq_length=MOONLIGHT.seq_length,
        sequences_per_step=MOONLIGHT.sequences_per_step,
        tp=4,
        ep=8,
        fp8_storage=False,
        has_overlap=False,
    )
    stage = ReinforcementLearning(
        group_size=ANSWERS,
        mini_batches=MINI_BATCHES,
        prompt_tokens=512,
        median_tokens=1500,
    )
    found = _recipe(
        name("moonlight_16b_a3b", num_gpus, gpu), MOONLIGHT, layout, stage, is_fp8=False
    )
    return found.replace(
        sources=(*SOURCES, *MOONLIGHT_SOURCES),
        differences=(*DIFFERENCES, FILES_DIFFERENCE),
        previous=f"moonlight_16b_a3b_sft_{num_gpus}gpu_{gpu}",
    )


def name(model: str, num_gpus: int, gpu: str) -> str:
    """The name under which ``RECIPES`` has it, ``<model>_rl_<N>gpu_<hw>``."""
    return f"{model}_rl_{num_gpus}gpu_{gpu}"


def _recipe(
    name: str, phase: Phase, layout: RunRequest, stage: ReinforcementLearning, *, is_fp8: bool
) -> Recipe:
    """With engines on the fewest nodes that hold them, and the offload that leaves them room."""
    lengths = stage.lengths(phase)
    nodes = layout.world_size // GPUS_PER_NODE
    asked = RlRequest(
        trainer=layout.replace(document_tokens=lengths.document_tokens),
        engines=EngineLayout(nodes, 1, is_fp8=is_fp8, slots=GPUS_PER_NODE),
        lengths=lengths,
        group_size=ANSWERS,
        mini_batches=MINI_BATCHES,
        groups_in_play=stage.in_play(phase),
    )
    fitted = asked.replace(trainer=fit_to_memory(asked.trainer, reserved_gb(asked)))
    slots = round(ROOM * asked.groups_in_play * ANSWERS)
    engines = fewest_nodes(fitted, slots)
    return Recipe(
        name=name,
        layout=fitted.trainer,
        phase=phase,
        precision="bf16",
        checkpoint=CheckpointPolicy(interval=5, retain_interval=20, asynchronous=False),
        data=TaskData("data", "task_sets.json", "tokenizer", RELEASE[layout.preset.name]),
        loss=LossPolicy(stop_on_nonfinite=True, on_spike="off"),
        sources=SOURCES,
        stage=replace(stage, engines=engines),
        extra_flags=("--eval-every", "20"),
    )
