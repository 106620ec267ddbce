"""One agent loop for all: a policy plays a task in an environment, and a record is what is left.

RL, synthesis and evaluation call ``play``. Whatever a policy or an environment does (raises, hangs,
answers late, answers nonsense), the record says it: only the cancellation of the caller's own task
goes through. What the policy is not to blame for is *unknown*, and not counted against it: failures
of either side and deadlines in seconds. What it is to blame for, turns and tokens that are used up,
is judged as it stands.

Both sides must be asynchronous in earnest: a call that keeps the event loop holds every episode of
the process, and no deadline can end it.
"""

import asyncio
import functools
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_k2.errors import UserError
from megatron_k2.gym.control import Cancelled, Control, Late, contained
from megatron_k2.gym.protocol import Environment, Step, Task, Verdict, unknown
from megatron_k2.records.messages import Message, ToolSpec
from megatron_k2.records.rollouts import JUDGED, End, Rollout, Sampled


class Again(Exception):  # noqa: N818 - a request, not a mistake
    """An environment's ``step`` raises this where nothing has happened and it may be called again.

    Other errors of ``step`` end the episode: an action that was half done must not be done twice.
    """


@dataclass(frozen=True)
class View:
    """What a policy sees: nothing of the task but what the environment says of it."""

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...]
    num_tokens_left: int | None
    """Of the task's budget; ``None``: no budget."""


@dataclass(frozen=True)
class Action:
    """What a policy says, and the tokens it drew for it where they are known."""

    message: Message
    sampled: Sampled | None = None


class Policy(Protocol):
    """An engine behind a chat template, a script, a person."""

    def __call__(self, view: View) -> Awaitable[Action]:
        """The next action."""


@dataclass(frozen=True)
class Bounds:
    """Of one trajectory.

    Raises:
        UserError: a value that is not positive.
    """

    num_turns: int = 64
    """Actions of the policy."""
    call_seconds: float = 120.0
    """For one call of the environment."""
    seconds: float = 3600.0
    """For the trajectory, pauses and the verification left out."""
    num_tries: int = 3
    """Of ``reset`` and ``verify``, and of a ``step`` that raises ``Again``."""
    wait_seconds: float = 0.5
    """Before the second try; twice as long before each further one."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise UserError(f"{name}={value}: expected a positive number")


KINDS = {"reset": "Step", "step": "Step", "verify": "Verdict"}


def _is_step(found: Any) -> bool:
    return isinstance(found, Step) and all(isinstance(each, Message) for each in found.messages)


def _is_verdict(found: Any) -> bool:
    try:
        json.dumps(dict(found.details), allow_nan=False)
    except (AttributeError, TypeError, ValueError):
        return False
    return isinstance(found, Verdict)


def _is_action(found: Any) -> bool:
    return (
        isinstance(found, Action)
        and isinstance(found.message, Message)
        and found.message.role == "assistant"
        and isinstance(found.sampled, Sampled | None)
    )


class _Ended(Exception):  # noqa: N818 - what happened
    def __init__(self, end: End, reason: str) -> None:
        super().__init__(reason)
        self.end = end


def _why(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {problem}"[:300].rstrip(": ")


async def play(
    policy: Policy,
    environment: Environment,
    task: Task,
    bounds: Bounds | None = None,
    control: Control | None = None,
) -> Rollout:
    """Play a task to its end; a record, whatever happens.

    Args:
        policy: is called with what it may see.
        environment: of this episode alone.
        task: to play.
        bounds: of the trajectory.
        control: of this episode, or of many.
    """
    return await _Episode(policy, environment, task, bounds or Bounds(), control or Control()).run()


@dataclass
class _Episode:
    policy: Policy
    environment: Environment
    task: Task
    bounds: Bounds
    control: Control
    messages: list[Message] = field(default_factory=list)
    actions: list[int] = field(default_factory=list)
    sampled: list[Sampled | None] = field(default_factory=list)
    retries: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    async def run(self) -> Rollout:
        began = self.control.clock()
        self.until = began + self.bounds.seconds
        try:
            await self._turns()
            end, reason = End.OVER, ""
        except _Ended as ended:
            end, reason = ended.end, str(ended)
        verdict = unknown(reason)
        if end in JUDGED:
            try:
                verdict = await self._environment("verify", self.environment.verify, _is_verdict)
            except _Ended as ended:
                end, reason = ended.end, str(ended)
                verdict = unknown(reason)
        self.seconds["total"] = self.control.clock() - began
        return self._record(end, reason, verdict)

    async def _turns(self) -> None:
        """The loop; returns where the environment says it is over."""
        step = await self._environment(
            "reset", functools.partial(self.environment.reset, self.task), _is_step
        )
        while True:
            self.messages += step.messages
            if step.is_over:
                return
            self._check_budget()
            action = await self._act()
            self.actions.append(len(self.messages))
            self.messages.append(action.message)
            self.sampled.append(action.sampled)
            said = functools.partial(self.environment.step, action.message)
            step = await self._environment("step", said, _is_step)

    def _num_tokens_left(self) -> int | None:
        if self.task.budget_tokens is None:
            return None
        return self.task.budget_tokens - sum(len(each.token_ids) for each in self.sampled if each)

    def _check_budget(self) -> None:
        if len(self.actions) >= self.bounds.num_turns:
            raise _Ended(End.TURNS, f"{self.bounds.num_turns} turns without an end")
        left = self._num_tokens_left()
        if left is not None and left <= 0:
            raise _Ended(End.TOKENS, f"{self.task.budget_tokens} tokens without an end")

    async def _act(self) -> Action:
        view = View(tuple(self.messages), self.task.tools, self._num_tokens_left())
        try:
            action = await self._timed("policy", lambda: self.policy(view), self.until)
        except Late:
            raise _Ended(End.DEADLINE, self._too_long("the policy")) from None
        except Cancelled as asked:
            raise _Ended(End.CANCELLED, str(asked)) from None
        except Exception as problem:  # whatever a policy raises
            raise _Ended(End.POLICY, f"the policy raised {_why(problem)}") from None
        if not _is_action(action):
            raise _Ended(End.POLICY, f"the policy gave {repr(action)[:200]}; expected an Action")
        return action

    async def _environment[T](
        self, name: str, call: Callable[[], Awaitable[T]], is_fine: Callable[[Any], bool]
    ) -> T:
        """A call of the environment, and again where that is safe and may help."""
        is_verify = name == "verify"
        why = ""
        for number in range(1, self.bounds.num_tries + 1):
            end = self.control.clock() + self.bounds.call_seconds
            until = end if is_verify else min(end, self.until)
            try:
                found = await self._timed("verify" if is_verify else "environment", call, until)
            except Late:
                if not is_verify and self.control.clock() >= self.until:
                    raise _Ended(End.DEADLINE, self._too_long(name)) from None
                why = f"{name} took more than {self.bounds.call_seconds:g} seconds"
                may_repeat = name != "step"
            except Cancelled as asked:
                raise _Ended(End.CANCELLED, str(asked)) from None
            except Exception as problem:  # whatever an environment raises
                why = f"{name} raised {_why(problem)}"
                may_repeat = name != "step" or isinstance(problem, Again)
            else:
                if is_fine(found):
                    return found
                why = f"{name} gave {repr(found)[:200]}, which is no {KINDS[name]}"
                may_repeat = False
            if not may_repeat or number == self.bounds.num_tries:
                break
            self.retries.append(why)
            await self._wait(number)
        raise _Ended(End.ENVIRONMENT, f"{why}, at try {number}" if number > 1 else why)

    async def _wait(self, number: int) -> None:
        """Before the next try; seconds that cancellation cuts short."""
        pause = asyncio.sleep(self.bounds.wait_seconds * 2 ** (number - 1))
        try:
            await self.control.within(pause, float("inf"), what="a wait")
        except Cancelled as asked:
            raise _Ended(End.CANCELLED, str(asked)) from None

    async def _timed[T](self, name: str, call: Callable[[], Awaitable[T]], until: float) -> T:
        """Wait while paused, then make the call; its seconds are the record's."""
        await self.control.turn(until)
        began = time.monotonic()
        try:
            return await self.control.within(contained(call), until, what=name)
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began

    def _too_long(self, where: str) -> str:
        return f"the trajectory took more than {self.bounds.seconds:g} seconds, at {where}"

    def _record(self, end: End, reason: str, verdict: Verdict) -> Rollout:
        return Rollout(
            task_id=self.task.id,
            domain=self.task.domain,
            messages=tuple(self.messages),
            end=end,
            outcome=verdict.outcome.value,
            reward=verdict.reward,
            evidence=verdict.evidence,
            reason=reason,
            details=dict(verdict.details),
            tools=self.task.tools,
            actions=tuple(self.actions),
            sampled=tuple(self.sampled),
            retries=tuple(self.retries),
            seconds={name: round(value, 4) for name, value in self.seconds.items()},
        )
