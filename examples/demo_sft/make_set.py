"""Dialogues from the standard library, for ``run.sh``: ``python make_set.py OUT``.

Three kinds, none written by a model: a question about a documented function, answered by its
signature and the first line of its documentation; a question that takes a call of a tool, whose
result is what Python really returns; and two such questions in one dialogue.

What is held out: a fifth of the arguments of every tool (``held_out.jsonl``: the bar), and a whole
module, ``datetime``, no tool of which is trained on (``other_module.jsonl``: reported).
"""

import datetime
import importlib
import inspect
import json
import math
import random
import statistics
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NUM_TOOL_DIALOGUES, NUM_TESTS = 7500, 60
HELD_OUT = 5
"""One in so many argument lists is never trained on."""
DOCUMENTED = (
    "argparse base64 bisect calendar collections contextlib copy csv dataclasses difflib fnmatch "
    "fractions functools glob hashlib heapq html inspect itertools json math operator os pathlib "
    "random re shutil socket statistics string subprocess tempfile textwrap time types"
).split()


@dataclass(frozen=True)
class Tool:
    """A function of the standard library as a tool, and how people ask for it."""

    module: str
    name: str
    description: str
    arguments: tuple[str, ...]
    ask: str
    draw: Callable[[random.Random], tuple[Any, ...]]
    run: Callable[..., Any]

    def declaration(self) -> dict[str, Any]:
        """OpenAI's form."""
        kinds = {"values": {"type": "array"}}
        properties = {name: kinds.get(name, {"type": "integer"}) for name in self.arguments}
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": {"type": "object", "properties": properties},
            },
        }


def _pair(random: random.Random) -> tuple[int, int]:
    return random.randint(2, 99), random.randint(2, 99)


def _values(random: random.Random) -> tuple[list[int]]:
    return ([random.randint(2, 99) for _ in range(2)],)


def _choice(random: random.Random) -> tuple[int, int]:
    n = random.randint(5, 60)
    return n, random.randint(1, 4)


def _date(random: random.Random) -> tuple[int, int, int]:
    return random.randint(1900, 2099), random.randint(1, 12), random.randint(1, 28)


TOOLS = (
    Tool("math", "gcd", "Greatest common divisor", ("a", "b"),
         "What is the greatest common divisor of {} and {}?", _pair, math.gcd),
    Tool("math", "lcm", "Least common multiple", ("a", "b"),
         "What is the least common multiple of {} and {}?", _pair, math.lcm),
    Tool("math", "comb", "Ways to choose k of n", ("n", "k"),
         "From {} things, how many ways are there to choose {}?", _choice, math.comb),
    Tool("math", "isqrt", "Integer square root", ("n",),
         "What is the integer square root of {}?",
         lambda r: (r.randint(10, 199),), math.isqrt),
    Tool("statistics", "mean", "Arithmetic mean", ("values",),
         "What is the mean of {}?", _values, statistics.fmean),
    Tool("statistics", "harmonic_mean", "Harmonic mean", ("values",),
         "What is the harmonic mean of {}?", _values, statistics.harmonic_mean),
)  # fmt: skip
OTHERS = (
    Tool("datetime", "weekday", "Day of the week, Monday is 0", ("year", "month", "day"),
         "Which weekday is year {} month {} day {}?", _date,
         lambda *day: datetime.date(*day).weekday()),
    Tool("datetime", "ordinal", "Days since the year 1", ("year", "month", "day"),
         "Which day is year {} month {} day {} by number?", _date,
         lambda *day: datetime.date(*day).toordinal()),
)  # fmt: skip


def is_held_out(tool: Tool, arguments: tuple[Any, ...]) -> bool:
    """Decided by the arguments themselves, so that no list of them is needed."""
    return zlib.crc32(f"{tool.name}{arguments}".encode()) % HELD_OUT == 0


def drawn(tool: Tool, random: random.Random, *, held_out: bool) -> tuple[Any, ...]:
    """Arguments of one kind."""
    while is_held_out(tool, arguments := tool.draw(random)) != held_out:
        pass
    return arguments


def turns(tool: Tool, arguments: tuple[Any, ...], index: int) -> list[dict[str, Any]]:
    """A question, the call, its result as Python gives it, and an answer in words."""
    call_id = f"functions.{tool.name}:{index}"
    named = dict(zip(tool.arguments, arguments, strict=True))
    function = {"name": tool.name, "arguments": json.dumps(named)}
    result = json.dumps(tool.run(*arguments))
    return [
        {"role": "user", "content": tool.ask.format(*arguments)},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": call_id, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": call_id, "content": result},
        {"role": "assistant", "content": f"It is {result}."},
    ]


def _declared(tool: Tool, among: tuple[Tool, ...], random: random.Random) -> list[dict[str, Any]]:
    """The tool, in every third dialogue with another one, in either order."""
    if random.random() < 2 / 3:
        return [tool.declaration()]
    other = random.choice([one for one in among if one is not tool])
    return [one.declaration() for one in random.sample([tool, other], 2)]


def tool_dialogues(random: random.Random, number: int) -> Iterator[dict[str, Any]]:
    """One question or two, of arguments that are not held out."""
    for _ in range(number):
        tool = random.choice(TOOLS)
        messages = []
        for index in range(random.choice([1, 1, 2])):
            messages += turns(tool, drawn(tool, random, held_out=False), index)
        yield {"messages": messages, "tools": _declared(tool, TOOLS, random), "source": tool.name}


def tests(
    tools: tuple[Tool, ...], random: random.Random, number: int, *, held_out: bool
) -> Iterator[dict[str, Any]]:
    """A question, and the call that answers it as ``expected``."""
    for i in range(number):
        tool = tools[i % len(tools)]
        question, call, *_ = turns(tool, drawn(tool, random, held_out=held_out), 0)
        yield {
            "messages": [question],
            "tools": _declared(tool, (*TOOLS, *tools), random),
            "expected": call["tool_calls"][0]["function"],
        }


def documented() -> Iterator[dict[str, Any]]:
    """A question about each documented function of ``DOCUMENTED``, answered by what it says."""
    for module_name in DOCUMENTED:
        module = importlib.import_module(module_name)
        for name in sorted(getattr(module, "__all__", None) or vars(module)):
            found = getattr(module, name, None)
            text = inspect.getdoc(found) if inspect.isroutine(found) else None
            if name.startswith("_") or not text:
                continue
            try:
                signature = str(inspect.signature(found))
            except (TypeError, ValueError):
                continue
            summary = text.splitlines()[0]
            answer = f"{module_name}.{name}{signature}\n{summary}"
            if len(answer) > 200 or " at 0x" in answer:
                continue
            question = f"How is {module_name}.{name} called, and what does it do?"
            yield {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ],
                "source": module_name,
            }


def write(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    """One object a line; returns how many. The same again is left as it is, its time too."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    text = "".join(lines)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return len(lines)


def main(out: Path) -> None:
    """All files of the demo."""
    out.mkdir(parents=True, exist_ok=True)
    counts = {
        "documented": write(out / "documented.jsonl", documented()),
        "tools": write(out / "tools.jsonl", tool_dialogues(random.Random(0), NUM_TOOL_DIALOGUES)),
        "held_out": write(
            out / "held_out.jsonl", tests(TOOLS, random.Random(1), NUM_TESTS, held_out=True)
        ),
        "other_module": write(
            out / "other_module.jsonl",
            tests(OTHERS, random.Random(2), NUM_TESTS // 3, held_out=True),
        ),
    }
    print(", ".join(f"{name} {count:,}" for name, count in counts.items()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
