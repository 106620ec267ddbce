"""What rank 0 has beside its part of the model: the engine, what collects, what is held out.

The engine here is the embedded one, in this process or in several on this machine: it is given
every weight before it answers anything, so that nothing is read twice. Another one is another
``MakeSide``.
"""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_k2.chat.template import Renderer
from megatron_k2.data.tokenizer import load_tokenizer
from megatron_k2.engine.local.core import Core
from megatron_k2.engine.local.engine import LocalEngine
from megatron_k2.engine.local.pool import PoolEngine
from megatron_k2.engine.local.weights import Weights
from megatron_k2.engine.local.worker import Share
from megatron_k2.engine.protocol import NO_WEIGHTS, Engine
from megatron_k2.errors import UserError
from megatron_k2.gym.protocol import Domain
from megatron_k2.presets import ModelPreset
from megatron_k2.rewards.calibration import read_calibration
from megatron_k2.rewards.rubric import RubricReward
from megatron_k2.rl.collected import metrics
from megatron_k2.rl.critic import EngineJudge, Refresher, Schedule
from megatron_k2.rl.curriculum import Stream
from megatron_k2.rl.cut import Cut
from megatron_k2.rl.handed_out import HandedOut
from megatron_k2.rl.held_out import HeldOut
from megatron_k2.rl.history import read_history
from megatron_k2.rl.ledger import Ledger
from megatron_k2.rl.lessons import Lesson, LessonMaker, Teacher
from megatron_k2.rl.loop import Collected, Side
from megatron_k2.rl.plan import Plan
from megatron_k2.rl.policy import Speaker
from megatron_k2.rl.record import Group
from megatron_k2.rl.rollouts import Collector
from megatron_k2.rl.scoring import GroupReward, RubricJudge
from megatron_k2.rl.task_sets import TaskSet, open_domains, read_task_sets
from megatron_k2.sft.sets import row_multiple

FOLDER = "rl"
"""Of a run's RL, in ``--save``."""
LEDGER = "ledger"


class Sampling:
    """Collects, tries what is held out, says where the ledger is.

    Args:
        collector: of the run.
        held_out: of the run.
        every: iterations between two evaluations; the first is of the weights it starts from.
        ledger: of both.
        domains: to be closed.
        engine: to be closed.
        teacher: of the critic, where it is refreshed.
    """

    def __init__(
        self,
        collector: Collector,
        held_out: HeldOut,
        every: int,
        ledger: Ledger,
        domains: Mapping[str, Domain],
        engine: Engine,
        teacher: Teacher | None = None,
    ) -> None:
        self._collector, self._held_out, self._every = collector, held_out, every
        self.ledger, self._domains, self._engine = ledger, domains, engine
        self._teacher = teacher

    async def ready(self) -> None:
        """It always is."""

    async def probes(self, version: int) -> tuple[Group, ...]:
        """None: the engine is this process's own."""
        del version
        return ()

    async def collect(self, iteration: int, version: int) -> Collected:
        """See ``loop.Collector``."""
        told = {} if self._teacher is None else await self._teacher.told()
        if self._every and iteration % self._every == 0:
            told |= await self._held_out.evaluate(iteration)
        found = await self._collector.collect(iteration, version)
        lessons: tuple[Lesson, ...] = ()
        if self._teacher is not None:
            lessons, of_lessons = await self._teacher.lessons(iteration, found.groups)
            told |= of_lessons
        position = self.ledger.position(iteration + 1)
        return Collected(found.groups, {**metrics(found), **told}, position, lessons)

    async def committed(self, iteration: int) -> None:
        """Nothing needs what only checkpoints before the last would read again but the last."""
        self.ledger.prune(iteration + 1)

    async def close(self) -> None:
        """Everything, whatever one of them does."""
        self.ledger.close()
        for domain in self._domains.values():
            await domain.close()
        await self._engine.close()


@dataclass(frozen=True)
class Basis:
    """What a run samples, read before anything expensive is made."""

    sets: tuple[TaskSet, ...]
    renderer: Renderer
    plan: Plan


def read_basis(args: Namespace, vocab_size: int) -> Basis:
    """Of ``--tasks``, ``--chat-tokenizer`` and the flags of sampling.

    Args:
        args: parsed.
        vocab_size: ids of the model.

    Raises:
        UserError: task sets or tokenizer are not what the run needs.
    """
    sets = read_task_sets(Path(args.tasks))
    renderer = Renderer(load_tokenizer(args.chat_tokenizer))
    _check_vocabulary(renderer, vocab_size, args.chat_tokenizer)
    return Basis(sets, renderer, plan_of(args))


def open_sampling(
    args: Namespace, basis: Basis, engine: Engine, domains: Mapping[str, Domain]
) -> Sampling:
    """The collector, what is held out, and the ledger of both, which is held from here on.

    Args:
        args: parsed.
        basis: of the run.
        engine: that answers; closed with the rest.
        domains: of all tasks, by name; closed with the rest.

    Raises:
        UserError: the ledger is in use, damaged or another run's, or the critic is not trusted.
    """
    sets, plan = basis.sets, basis.plan
    judges = _judges(args, sets, engine, basis.renderer)
    folder = Path(args.save) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    stream = Stream(sets, args.seed)
    terms = {"seed": args.seed, "group_size": args.group_size}
    ledger = Ledger(folder / LEDGER, stream, terms, lambda text: print(text, flush=True))
    routes = not args.no_router_replay
    speaker = Speaker(engine, basis.renderer, args.seed, returns_routed_experts=routes)
    collector = Collector(plan, stream, speaker, domains, ledger, judges)
    held_out = HeldOut(
        sets, speaker, domains, ledger, args.eval_samples, plan.concurrency, plan.bounds
    )
    teacher = _teacher(args, basis, engine)
    return Sampling(collector, held_out, args.eval_every, ledger, domains, engine, teacher)


async def make_side(args: Namespace, preset: ModelPreset, iteration: int) -> Side:
    """The embedded engine, and the collector over ``--tasks``.

    Args:
        args: Megatron's and ours.
        preset: of the model.
        iteration: that the learner goes on with.

    Raises:
        UserError: task sets, tokenizer or ledger are not what the run needs.
    """
    basis = read_basis(args, preset.vocab_size)
    engine = _engine(args, preset, basis.plan.cut.num_slots)
    domains = await open_domains(basis.sets, sandbox=args.sandbox)
    sampling = open_sampling(args, basis, engine, domains)
    check_position(sampling.ledger, Path(args.save) / FOLDER, iteration)
    return Side(sampling, engine)


def plan_of(args: Namespace) -> Plan:
    """How much is sampled, by the flags; ``--groups-in-play`` is half as many again by default.

    Raises:
        UserError: counts that do not go together.
    """
    prompts = args.prompts_per_iteration
    in_play = args.groups_in_play or prompts + prompts // 2
    slots = args.engine_slots or min(in_play * args.group_size, 64)
    cut = Cut(prompts, slots, args.max_decode_steps)
    return Plan(args.group_size, cut, in_play, concurrency=max(2 * slots, 64))


def _engine(args: Namespace, preset: ModelPreset, num_slots: int) -> Engine:
    """Without weights: it is given them before it is asked for anything.

    Raises:
        UserError: more processes than slots, or more than one over a GPU.
    """
    dtype, number = torch.bfloat16 if args.bf16 else torch.float32, args.engine_processes
    if number == 1:
        device = torch.device("cuda", torch.cuda.current_device()) if _has_cuda() else "cpu"
        weights = Weights(preset, dtype, torch.device(device))
        core = Core(
            weights,
            num_slots=num_slots,
            max_length=args.seq_length,
            version=NO_WEIGHTS,
            is_batch_invariant=args.batch_invariant,
        )
        return LocalEngine(core)
    if _has_cuda():
        raise UserError(
            f"--engine-processes {number}: on a CPU alone; leave it, since a GPU's engine is one "
            "process, or let engines stand elsewhere (--meet)"
        )
    share = Share(
        preset, dtype, num_slots, args.seq_length, is_batch_invariant=args.batch_invariant
    )
    return PoolEngine.over(share, None, number)


def _has_cuda() -> bool:
    """Not ``torch.cuda.is_available``, which a host without one answers for."""
    return torch.version.cuda is not None and Path("/dev/nvidiactl").exists()


def _check_vocabulary(renderer: Renderer, vocab_size: int, path: str) -> None:
    most = max(renderer.control.by_name.values())
    if most >= vocab_size:
        raise UserError(
            f"--chat-tokenizer {path}: a control token has id {most}, and the model "
            f"{vocab_size:,} ids; give the tokenizer that it was trained with"
        )


def check_position(ledger: HandedOut[Any], folder: Path, iteration: int) -> None:
    """Refuse a ledger that is not the one whose iterations a checkpoint has trained on.

    Args:
        ledger: of the run, or a reader of it.
        folder: of the run's RL.
        iteration: that the checkpoint goes on with.

    Raises:
        UserError: it is another's, or holds fewer iterations.
    """
    rows = [row for row in read_history(folder) if row.iteration == iteration - 1]
    if rows and rows[0].position:
        ledger.check_position(rows[0].position)
    if iteration > ledger.num_iterations:
        raise UserError(
            f"the checkpoint has trained on {iteration} iterations and {folder / LEDGER} holds "
            f"{ledger.num_iterations}; give the folder that belongs to it"
        )


def _judges(
    args: Namespace, sets: tuple[TaskSet, ...], engine: Engine, renderer: Renderer
) -> dict[str, GroupReward]:
    """The actor as its own critic, for the sets that a rubric rewards."""
    names = [each.name for each in sets if each.reward == "rubric"]
    if not names:
        return {}
    if args.critic is None:
        raise UserError(
            f"task set {names[0]!r} is rewarded by a rubric; give --critic FILE.json of "
            "'megatron-k2 critic calibrate --output', by which the critic may be trusted"
        )
    calibration = read_calibration(Path(args.critic))
    calibration.require_trusted(is_forced=args.force_critic)
    reward = RubricReward(EngineJudge(engine, renderer), correction=calibration.correction)
    return {name: RubricJudge(reward, renderer) for name in names}


def lesson_maker(args: Namespace, basis: Basis) -> LessonMaker | None:
    """Of the critic's lessons, where ``--critic-refresh-every`` asks for them."""
    if not args.critic_refresh_every:
        return None
    return LessonMaker(
        Schedule(args.critic_refresh_every),
        basis.renderer,
        basis.sets,
        args.seq_length,
        row_multiple(args.context_parallel_size),
    )


def _teacher(args: Namespace, basis: Basis, engine: Engine) -> Teacher | None:
    """The actor is its own critic."""
    maker = lesson_maker(args, basis)
    if maker is None:
        return None
    return Teacher(maker, Refresher(EngineJudge(engine, basis.renderer, "critic"), maker.rubrics))
