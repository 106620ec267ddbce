"""Tasksets of the package verifiers (v1), scored directly: our rollout, their trace, their rewards.

Their own runner starts a process, a proxy and a harness for each rollout; a trace that is built
here and handed to ``task.score`` costs a thousandth of it. A reward of theirs may be any number:
1 is *right*, anything else is *wrong* with the number in ``details``.
"""

import asyncio
from collections.abc import Iterable
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.gym.protocol import (
    Environment,
    Step,
    Task,
    Verdict,
    right,
    unknown,
    wrong,
)
from megatron_k2.records.messages import Message

NAME = "verifiers"


class VerifiersDomain:
    """One of their tasksets.

    Args:
        taskset: an instance, iterable over its tasks.
        seconds: wall deadline of one score; theirs is not ours to interrupt otherwise.

    Raises:
        UserError: the package is not installed.
    """

    name = NAME

    def __init__(self, taskset: Iterable[Any], seconds: float = 60.0) -> None:
        try:
            import verifiers.v1 as vf
        except ImportError:
            raise UserError(
                "verifiers is not installed; pip install 'megatron-k2[verifiers]'"
            ) from None
        self._vf, self._seconds = vf, seconds
        self._pairs: dict[str, tuple[Task, Any]] = {}
        for place, theirs in enumerate(taskset):
            reference = {"taskset": type(taskset).__name__, "place": place}
            task = Task(NAME, _prompt(theirs), reference, source=NAME)
            self._pairs[task.id] = task, theirs

    def tasks(self) -> list[Task]:
        """Theirs as ours, in their order."""
        return [task for task, _ in self._pairs.values()]

    async def judge(self, task: Task, answer: str) -> Verdict:
        """Score a single answer."""
        said = (Message("user", task.prompt), Message("assistant", answer))
        return await self.scored(task, said)

    async def scored(self, task: Task, messages: Iterable[Message]) -> Verdict:
        """Score a whole dialogue; what their code raises, and its lateness, are *unknown*."""
        if task.id not in self._pairs:
            return unknown(f"no task {task.id!r} in the taskset")
        _, theirs = self._pairs[task.id]
        trace = self._trace(theirs, messages)
        try:
            async with asyncio.timeout(self._seconds):
                await theirs.score(trace)
            reward = float(trace.reward)
        except TimeoutError:
            return unknown(f"their verifier took more than {self._seconds:g} seconds")
        except Exception as problem:  # whatever code of theirs raises
            return unknown(f"their verifier raised {type(problem).__name__}: {problem}"[:300])
        failed = [name for name, value in trace.rewards.items() if value is None]
        if failed:
            return unknown(f"their reward {failed[0]!r} gave nothing")
        metrics = {name: value for name, value in trace.metrics.items() if value is not None}
        verdict = right if reward == 1.0 else wrong
        return verdict(f"their reward is {reward:g}", reward=reward, metrics=metrics)

    def environment(self) -> Environment:
        """One turn; tasksets with tools of their own need their harness."""
        return _Episode(self)

    async def close(self) -> None:
        """Nothing is open."""

    def _trace(self, theirs: Any, messages: Iterable[Message]) -> Any:
        from verifiers.v1.graph import MessageNode
        from verifiers.v1.trace import AgentInfo, Trace, TraceTask

        kinds = {
            "system": self._vf.SystemMessage,
            "user": self._vf.UserMessage,
            "assistant": self._vf.AssistantMessage,
            "tool": self._vf.ToolMessage,
        }
        agent = AgentInfo(config=self._vf.AgentConfig(model="policy"))
        trace = Trace(task=TraceTask(type=type(theirs).__name__, data=theirs.data), agent=agent)
        for place, message in enumerate(messages):
            fields = {"content": message.content}
            if message.role == "tool":
                fields["tool_call_id"] = message.tool_call_id or ""
            node = MessageNode(
                parent=place - 1 if place else None,
                message=kinds[message.role](**fields),
                sampled=message.role == "assistant",
            )
            trace.nodes.append(node)
        return trace


class _Episode:
    def __init__(self, domain: VerifiersDomain) -> None:
        self._domain, self._task = domain, Task(NAME, "", {})
        self._messages: list[Message] = []

    async def reset(self, task: Task) -> Step:
        self._task, self._messages = task, [Message("user", task.prompt)]
        return Step(tuple(self._messages))

    async def step(self, action: Message) -> Step:
        self._messages.append(action)
        return Step(is_over=True)

    async def verify(self) -> Verdict:
        return await self._domain.scored(self._task, self._messages)


def _prompt(task: Any) -> str:
    """The text of a task's prompt, which is a string or messages."""
    prompt = task.data.prompt
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(str(getattr(each, "content", each)) for each in prompt)
