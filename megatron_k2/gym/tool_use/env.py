"""The domain of tool use: calls in K2's format, executed, judged by the state they leave.

``reference`` has ``state``, from which an episode begins, and ``goal``, which it must leave. The
text of calls is not compared, nor their number: another way to the same state is right, and words
about it are nothing. As a single answer, ``judge`` takes one turn as K2 writes it, with all calls.
"""

from collections.abc import Mapping
from typing import Any

from megatron_k2.chat.call_ids import call_id
from megatron_k2.chat.completion import FormatError, parse_completion
from megatron_k2.chat.control import IM_END
from megatron_k2.chat.lexer import TextLexer
from megatron_k2.errors import UserError
from megatron_k2.gym.judging import SingleAnswerDomain
from megatron_k2.gym.protocol import Environment, Step, Task, Verdict, right, wrong
from megatron_k2.gym.tool_use.calendar import State, same_form
from megatron_k2.gym.tool_use.calls import answered, missing
from megatron_k2.records.messages import Message

NAME = "tool_use"
MOST_CALLS = 64
"""Of one episode."""


class ToolUse(SingleAnswerDomain):
    """Executes calls in this process: the tools are ours, and check what they are given.

    Raises:
        UserError: jsonschema is not installed.
    """

    name = NAME

    def __init__(self) -> None:
        if problem := missing():
            raise UserError(problem)

    async def _judged(self, task: Task, answer: str) -> Verdict:
        environment = CalendarEpisode()
        await environment.reset(task)
        try:
            whole = answer if answer.endswith(IM_END) else answer + IM_END
            said = parse_completion(TextLexer(), whole, "strict", task.tools)
        except FormatError as problem:
            return wrong(f"not K2's format: {problem}"[:300])
        await environment.step(said.to_message())
        return await environment.verify()

    def environment(self) -> Environment:
        """Of turns: calls, their answers, and a turn without calls at the end."""
        return CalendarEpisode()


class CalendarEpisode:
    """One calendar; a turn that calls nothing ends the episode."""

    def __init__(self) -> None:
        self._state: State | None = None
        self._goal: dict[str, list[str]] = {}
        self._num_calls = 0

    async def reset(self, task: Task) -> Step:
        """The request.

        Raises:
            UserError: the reference holds no two states.
        """
        try:
            self._goal = same_form(task.reference["goal"])
            self._state = _copied(task.reference["state"])
        except (AttributeError, KeyError, TypeError) as problem:
            raise UserError(
                f"the reference cannot be read: {type(problem).__name__} {problem}; expected "
                "state and goal, each with events and notices"
            ) from None
        self._num_calls = 0
        return Step((Message("user", task.prompt),))

    async def step(self, action: Message) -> Step:
        """Execute the calls in their order; those beyond ``MOST_CALLS`` are not."""
        if self._state is None:
            raise UserError("step before reset: the environment has no task")
        answers = []
        for call in action.tool_calls:
            if self._num_calls == MOST_CALLS:
                break
            identity = call.id or call_id(call.name, self._num_calls)
            self._num_calls += 1
            self._state, text = answered(self._state, call)
            answers.append(Message("tool", text, name=call.name, tool_call_id=identity))
        is_over = not action.tool_calls or self._num_calls == MOST_CALLS
        return Step(tuple(answers), is_over)

    async def verify(self) -> Verdict:
        """Compare the state with the goal."""
        if self._state is None:
            raise UserError("verify before reset: the environment has no task")
        found = same_form(self._state)
        if found == self._goal:
            return right(f"the state is the goal's, after {self._num_calls} calls")
        missing = _beyond(self._goal, found)
        surplus = _beyond(found, self._goal)
        lists = (("missing", missing), ("too much", surplus))
        why = "; ".join(f"{word}: {', '.join(items)}" for word, items in lists if items)
        return wrong(why[:600], missing=missing, surplus=surplus, num_calls=self._num_calls)


def _copied(state: Mapping[str, Any]) -> State:
    return {"events": dict(state["events"]), "notices": list(state["notices"])}


def _beyond(some: dict[str, list[str]], others: dict[str, list[str]]) -> list[str]:
    """What is in ``some`` more often than in ``others``."""
    found = []
    for name, items in some.items():
        left = list(others[name])
        for item in items:
            if item in left:
                left.remove(item)
            else:
                found.append(f"{name} {item}")
    return found
