"""The two domains of ``run.sh``: a tool that is really called, and numbers put in order."""

import json
from typing import Any

from make_set import TOOLS

from megatron_k2.gym.judging import SingleAnswerDomain
from megatron_k2.gym.protocol import Environment, Step, Task, Verdict, right, wrong
from megatron_k2.records.messages import Message, ToolCall

FUNCTIONS = {tool.name: tool for tool in TOOLS}
MOST_CALLS = 4


def called(call: ToolCall) -> str:
    """A call's result as JSON text; what is wrong with it is an answer too."""
    tool = FUNCTIONS.get(call.name)
    if tool is None:
        return json.dumps({"error": f"no tool {call.name!r}"})
    try:
        given = json.loads(call.arguments)
        if not isinstance(given, dict) or set(given) != set(tool.arguments):
            raise ValueError(f"expected {', '.join(tool.arguments)}")
        return json.dumps(tool.run(*(_number(given[name]) for name in tool.arguments)))
    except (ArithmeticError, TypeError, ValueError) as problem:
        return json.dumps({"error": str(problem)[:100]})


def _number(value: Any) -> Any:
    """Small integers, or a short list of them: a model's arguments are not trusted to be."""
    values = value if isinstance(value, list) else [value]
    if not 0 < len(values) <= 8 or not all(type(x) is int and abs(x) < 10**4 for x in values):
        raise ValueError(f"{str(value)[:40]}: expected integers below 10,000")
    return value


class Calls(SingleAnswerDomain):
    """A question, and one call in K2's format that computes the answer."""

    name = "domains:Calls"

    async def _judged(self, task: Task, answer: str) -> Verdict:
        return wrong("words; expected a call")

    def environment(self) -> Environment:
        """One turn of calls, which are executed."""
        return _Episode()


class _Episode:
    def __init__(self) -> None:
        self._wanted, self._results = "", list[str]()

    async def reset(self, task: Task) -> Step:
        self._wanted, self._results = task.reference["result"], []
        return Step((Message("user", task.prompt),))

    async def step(self, action: Message) -> Step:
        self._results = [called(call) for call in action.tool_calls[:MOST_CALLS]]
        return Step(is_over=True)

    async def verify(self) -> Verdict:
        """Right where one call was made, and gave what the question asks for."""
        if self._results == [self._wanted]:
            return right(f"the call gave {self._wanted}")
        return wrong(f"the calls gave {', '.join(self._results) or 'nothing'}, not {self._wanted}")


class Sorted(SingleAnswerDomain):
    """Numbers in order, to the letter."""

    name = "domains:Sorted"

    async def _judged(self, task: Task, answer: str) -> Verdict:
        wanted = task.reference["text"]
        is_right = answer.strip() == wanted
        return right(wanted) if is_right else wrong(f"{answer[:60]!r}, wanted {wanted!r}")
