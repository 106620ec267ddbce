"""The collector: K answers to each prompt, iteration after iteration, nothing lost between them.

``collect(i, version)`` gives the groups that iteration i trains on. Where the ledger has them, they
come from it; else they are sampled: answers that the iteration before cut off come first, then new
prompts up to ``groups_in_play``. Which groups come out hangs on the answers alone (``cut.py``):
not on speed, concurrency, or where a run was killed.

An answer that was cut off is resumed by playing its actions again in a new environment, whether or
not the process is still the same: one way, tried in every iteration. Assumption: an environment
says the same again to the same actions, as all of ``gym/`` do; where one does not, the answer fails
by name. Deadlines in seconds count from each resumption. The report keeps environments alive
instead, which spares the repetition and is lost with the process.
"""

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_k2.engine.protocol import EngineError
from megatron_k2.errors import UserError
from megatron_k2.gym.episode import play
from megatron_k2.gym.protocol import Domain
from megatron_k2.records.rollouts import JUDGED, End, Rollout
from megatron_k2.rl.answers import Answer
from megatron_k2.rl.curriculum import Prompt, Stream
from megatron_k2.rl.cut import Clock, Settled
from megatron_k2.rl.in_play import FinishedGroup, OpenGroup
from megatron_k2.rl.ledger import Ledger
from megatron_k2.rl.plan import Iteration, Plan
from megatron_k2.rl.policy import EnginePolicy, Speaker
from megatron_k2.rl.scoring import GroupReward, scores
from megatron_k2.rl.transcript import Transcript, cut_to

NUM_TRIES = 2
"""Ours: an answer whose environment failed is played once more, with what it had drawn."""


@dataclass
class _Place:
    """One answer of the iteration under way."""

    group: OpenGroup
    k: int
    num_before: int = 0
    """Tokens that earlier iterations drew for it."""
    answer: Answer | None = None
    transcript: Transcript = field(default_factory=Transcript)


@dataclass(frozen=True)
class _Meter:
    """One answer's part of the clock."""

    clock: Clock
    place: int

    def num_left(self) -> float:
        return self.clock.num_left(self.place)

    def draw(self, number: int) -> None:
        self.clock.draw(self.place, number)


class Collector:
    """Samples a run's iterations.

    Args:
        plan: how much.
        stream: of prompts, as the ledger has taught it.
        speaker: engine, format, seed.
        domains: by name, open; of every task's domain.
        ledger: of the run.
        judges: instead of the verifiers' verdicts, by task set: those whose reward is ``rubric``.

    Raises:
        UserError: a domain or a judge is missing.
    """

    def __init__(
        self,
        plan: Plan,
        stream: Stream,
        speaker: Speaker,
        domains: Mapping[str, Domain],
        ledger: Ledger,
        judges: Mapping[str, GroupReward] | None = None,
    ) -> None:
        self._plan, self._stream, self._speaker = plan, stream, speaker
        self._domains, self._ledger, self._judges = domains, ledger, judges or {}
        self._num_before = ledger.num_iterations
        for each in stream.task_sets.values():
            if missing := {task.domain for task in each.tasks} - set(domains):
                raise UserError(f"task set {each.name!r}: domain {missing.pop()!r} is not open")
            if each.reward == "rubric" and each.name not in self._judges:
                raise UserError(f"task set {each.name!r} is rewarded by a rubric; give its judge")

    async def collect(self, iteration: int, version: int) -> Iteration:
        """The groups of an iteration.

        Args:
            iteration: from 0; those that the ledger has in any order, else the next.
            version: of the weights that the engine holds, in optimizer steps.

        Raises:
            UserError: an iteration beyond the next, other weights than its record or the engine
                says, or a damaged ledger.
            EngineError: the engine is not ready any more. What was finished is kept: mend it, give
                it the weights, and ask again.
        """
        if iteration > self._ledger.num_iterations:
            raise UserError(
                f"iteration {iteration}: the ledger has {self._ledger.num_iterations}; ask for "
                f"{self._ledger.num_iterations} first"
            )
        if iteration == self._ledger.num_iterations:
            await self._sample(iteration, version)
        found = self._ledger.iteration(iteration, is_replayed=iteration < self._num_before)
        _check_version(iteration, found.version, version)
        return found

    async def _sample(self, iteration: int, version: int) -> None:
        """One iteration, into the ledger."""
        self._check_engine(version)
        if self._ledger.begun_version is None:
            self._ledger.begin(iteration, version, self._new_prompts())
        _check_version(iteration, self._ledger.begun_version, version)
        places = [
            _Place(group, k)
            for _, group in sorted(self._ledger.open_groups.items())
            for k in range(self._plan.group_size)
            if k not in group.answers
        ]
        clock = Clock([place.group.prompt.ordinal for place in places], self._plan.cut)
        waiting = [n for n, place in enumerate(places) if not self._is_known(n, place, clock)]
        room = asyncio.Semaphore(self._plan.concurrency)
        await all_of([self._answered(n, places[n], clock, room, iteration) for n in waiting])
        await self._settle(iteration, version, places, clock)

    def _check_engine(self, version: int) -> None:
        health = self._speaker.engine.health()
        if not health.is_ready:
            raise EngineError(health.detail)
        if health.weight_version != str(version):
            raise UserError(
                f"the engine holds weights of version {health.weight_version!r}, not {version}; "
                "give it the new ones before the next iteration"
            )

    def _new_prompts(self) -> list[Prompt]:
        """As many as are missing in play."""
        busy = {(g.prompt.task_set, g.prompt.task_id) for g in self._ledger.open_groups.values()}
        found = []
        for number in range(self._plan.groups_in_play - len(self._ledger.open_groups)):
            prompt = self._stream.draw(self._ledger.next_ordinal + number, busy)
            busy.add((prompt.task_set, prompt.task_id))
            found.append(prompt)
        return found

    def _is_known(self, number: int, place: _Place, clock: Clock) -> bool:
        """Take up what the ledger has of an answer; whether this iteration finished it before."""
        prompt, k = place.group.prompt, place.k
        if (state := place.group.states.get(k)) is not None:
            place.transcript = Transcript.of(self._ledger.read_state(state))
            place.num_before = place.transcript.num_sampled
        found = self._ledger.finished_answer(prompt, k)
        if found is None:
            return False
        num_steps, place.answer = found
        clock.draw(number, num_steps)
        clock.finish(number)
        return True

    async def _answered(
        self, number: int, place: _Place, clock: Clock, room: asyncio.Semaphore, iteration: int
    ) -> None:
        """Play one answer to its end or to the cut."""
        async with room:
            if not clock.begin(number):
                return
            rollout, policy = await self._played(place, _Meter(clock, number), iteration)
            if rollout is None:
                return
            place.answer = _answer(rollout, policy)
            clock.finish(number)
            self._ledger.answer(place.group.prompt, place.k, clock.steps(number), place.answer)

    async def _played(
        self, place: _Place, meter: _Meter, iteration: int
    ) -> tuple[Rollout | None, EnginePolicy]:
        """The episode, once more where its environment failed; no rollout: it was cut off."""
        prompt = place.group.prompt
        task = self._stream.task(prompt.task_set, prompt.task_id)
        temperature = self._stream.task_sets[prompt.task_set].temperature.at(iteration)
        name = f"{prompt.ordinal}/{place.k}"
        number = 0
        while True:
            number += 1
            environment = self._domains[task.domain].environment()
            policy = EnginePolicy(self._speaker, name, temperature, place.transcript, meter)
            rollout = await play(policy, environment, task, self._plan.bounds)
            if policy.is_cut_off:
                return None, policy
            if policy.engine_error is not None and not self._speaker.engine.health().is_ready:
                raise policy.engine_error
            if rollout.end is not End.ENVIRONMENT or number == NUM_TRIES:
                return rollout, policy

    async def _settle(
        self, iteration: int, version: int, places: list[_Place], clock: Clock
    ) -> None:
        """Write the cut: what is trained on, what goes on from where."""
        num_steps, settled = clock.settled()
        groups = {
            n: OpenGroup(g.prompt, dict(g.answers)) for n, g in self._ledger.open_groups.items()
        }
        num_drawn = 0
        for number, (place, left) in enumerate(zip(places, settled, strict=True)):
            num_drawn += clock.steps(number)
            self._carry(groups[place.group.prompt.ordinal], place, left)
        whole = [g for g in groups.values() if len(g.answers) == self._plan.group_size]
        done = [await self._scored(each, iteration) for each in whole]
        num_kept = sum(left.num_steps for left in settled)
        sets = self._stream.task_sets.values()
        facts = {
            "num_steps": int(num_steps),
            "temperatures": {each.name: each.temperature.at(iteration) for each in sets},
            "num_cut_off": sum(not left.is_finished for left in settled),
            "num_tokens": num_kept,
            "num_dropped_tokens": num_drawn - num_kept,
            "num_format_errors": sum(each.num_format_errors for each in done),
            "num_left_out": self._stream.num_left_out,
        }
        ended = {each.prompt.ordinal for each in whole}
        still_open = (each for ordinal, each in groups.items() if ordinal not in ended)
        self._ledger.end(version, done, still_open, facts)

    def _carry(self, group: OpenGroup, place: _Place, left: Settled) -> None:
        """What the cut leaves of one answer, into its group."""
        prompt, k = place.group.prompt, place.k
        if left.is_finished:
            group.answers[k] = self._ledger.finished[prompt.ordinal][k].ref
            return
        answer = place.answer
        segments = place.transcript.segments() if answer is None else answer.segments
        if kept := cut_to(segments, place.num_before + left.num_steps):
            group.states[k] = self._ledger.keep(kept)

    async def _scored(self, group: OpenGroup, iteration: int) -> FinishedGroup:
        prompt = group.prompt
        refs = tuple(group.answers[k] for k in range(self._plan.group_size))
        answers = [self._ledger.read_answer(ref) for ref in refs]
        found = await scores(
            self._stream.task_sets[prompt.task_set],
            self._stream.task(prompt.task_set, prompt.task_id),
            answers,
            iteration,
            self._stream.toggle_budget(prompt),
            self._judges.get(prompt.task_set),
        )
        verdicts = tuple(score.parts.get("verdict") for score in found)
        lengths = tuple(each.num_sampled for each in answers)
        num_errors = sum(each.num_format_errors for each in answers)
        return FinishedGroup(prompt, refs, tuple(found), verdicts, lengths, num_errors)


def _answer(rollout: Rollout, policy: EnginePolicy) -> Answer:
    """What is kept of an episode. One whose last turn was cut by its tokens ended by them."""
    is_cut = policy.is_out_of_tokens and rollout.end in JUDGED
    return Answer(
        policy.transcript.segments(),
        End.TOKENS if is_cut else rollout.end,
        rollout.reward,
        rollout.evidence,
        rollout.reason,
        policy.num_format_errors,
    )


def _check_version(iteration: int, recorded: int | None, given: int) -> None:
    if recorded != given:
        raise UserError(
            f"iteration {iteration} was sampled by weights of version {recorded}, and the learner "
            f"is at {given}: its checkpoint is not of this ledger's run, or it took other steps"
        )


async def all_of[T](calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """What all give, in their order; where one raises, the others are ended first."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
