"""A repository worked on in turns: look, search, edit, run, and say that it is done.

Files are text in this process; nothing of them is executed here. What is run runs in the sandbox
over the files as they are, without the tests that judge. An episode is over when the policy submits
or calls nothing, and then the files are judged as an answer of one turn is.
"""

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.gym.coding.env import Coding
from megatron_k2.gym.protocol import Step, Task, Verdict, unknown
from megatron_k2.gym.swe.edits import MOST_CHARACTERS
from megatron_k2.records.messages import Message, ToolCall, ToolSpec
from megatron_k2.records.read import no_constant, tool_from

MOST_CALLS = 128
MOST_READ = 20_000
"""Characters of one answer."""
_TEXT = {"type": "string"}
_TOOLS: dict[str, tuple[str, dict[str, Any]]] = {
    "list_files": ("Paths of the repository's files, with their lengths in lines.", {}),
    "read_file": (
        "Numbered lines of a file.",
        {"path": _TEXT, "first": {"type": "integer"}, "last": {"type": "integer"}},
    ),
    "search": ("Lines that contain a text, in all files.", {"text": _TEXT}),
    "replace": (
        "Replace a text that occurs once in a file by another.",
        {"path": _TEXT, "old": _TEXT, "new": _TEXT},
    ),
    "run_python": (
        "Run a program in the repository's folder, in a sandbox without network.",
        {"program": _TEXT},
    ),
    "submit": ("The work is done; the files are judged as they are.", {}),
}
TOOLS: tuple[ToolSpec, ...] = tuple(
    tool_from(
        {
            "type": "function",
            "function": {
                "name": name,
                "description": description,
                "parameters": {
                    "type": "object",
                    "properties": properties,
                    "required": list(properties),
                    "additionalProperties": False,
                },
            },
        }
    )
    for name, (description, properties) in _TOOLS.items()
)

_PROGRAM = "program_of_run_python.py"
_RUN = (
    f"import runpy, sys\nsys.path.insert(0, '')\nrunpy.run_path('{_PROGRAM}', run_name='__main__')"
)

type Judged = Callable[[Task, Mapping[str, str]], Awaitable[Verdict]]


class _Refused(Exception):  # noqa: N818 - an answer
    """What the policy reads instead of a result."""


class SweEpisode:
    """One repository, in turns.

    Args:
        programs: runs programs.
        judged: judges the files of a task.
    """

    def __init__(self, programs: Coding, judged: Judged) -> None:
        self._programs, self._judge = programs, judged
        self._task: Task | None = None
        self._files: dict[str, str] = {}
        self._num_calls = 0
        self._is_over = False

    async def reset(self, task: Task) -> Step:
        """The request.

        Raises:
            UserError: the reference has no files.
        """
        try:
            self._files = {str(path): str(text) for path, text in task.reference["files"].items()}
        except (AttributeError, KeyError, TypeError) as problem:
            raise UserError(f"the reference has no files by path: {problem!r}") from None
        self._task, self._num_calls, self._is_over = task, 0, False
        return Step((Message("user", task.prompt),))

    async def step(self, action: Message) -> Step:
        """Execute the calls in order; after *submit* none."""
        answers = []
        for call in action.tool_calls:
            if self._is_over or self._num_calls == MOST_CALLS:
                break
            self._num_calls += 1
            text = await self._answered(call)
            answers.append(Message("tool", text, name=call.name, tool_call_id=call.id))
        is_last = self._num_calls == MOST_CALLS
        return Step(tuple(answers), self._is_over or is_last or not action.tool_calls)

    async def verify(self) -> Verdict:
        """Judge the files as they are."""
        if self._task is None:
            raise UserError("verify before reset: the environment has no task")
        if sum(map(len, self._files.values())) > MOST_CHARACTERS:
            return unknown(f"more than {MOST_CHARACTERS} characters")
        return await self._judge(self._task, self._files)

    async def _answered(self, call: ToolCall) -> str:
        try:
            return (await self._done(call.name, _arguments(call)))[:MOST_READ]
        except _Refused as answer:
            return json.dumps({"error": str(answer)}, ensure_ascii=False)

    async def _done(self, name: str, given: dict[str, Any]) -> str:
        match name:
            case "list_files":
                return "\n".join(f"{p}: {t.count(chr(10))} lines" for p, t in self._files.items())
            case "read_file":
                lines = self._file(given["path"]).splitlines()
                chosen = list(enumerate(lines, start=1))[max(given["first"] - 1, 0) : given["last"]]
                return "\n".join(f"{number}\t{line}" for number, line in chosen) or "no lines there"
            case "search":
                return self._found(given["text"])
            case "replace":
                return self._replaced(given["path"], given["old"], given["new"])
            case "submit":
                self._is_over = True
                return "submitted"
        files = {path: text.encode("utf-8", "replace") for path, text in self._files.items()}
        files[_PROGRAM] = given["program"].encode("utf-8", "replace")
        run = await self._programs.program(_RUN, files)
        said = (run.stdout + run.stderr).decode("utf-8", "replace")
        how = run.reason or f"exit code {run.exit_code}"
        return f"{said[-MOST_READ + 200 :]}\n[{run.status}: {how}]"

    def _file(self, path: str) -> str:
        if path not in self._files:
            raise _Refused(f"no file {path[:100]!r}; there are {', '.join(self._files)}")
        return self._files[path]

    def _found(self, text: str) -> str:
        if not text:
            raise _Refused("an empty text is in every line")
        found = [
            f"{path}:{number}: {line}"
            for path, whole in self._files.items()
            for number, line in enumerate(whole.splitlines(), start=1)
            if text in line
        ]
        return "\n".join(found) or "no line has it"

    def _replaced(self, path: str, old: str, new: str) -> str:
        whole = self._file(path)
        if not old or (count := whole.count(old)) != 1:
            raise _Refused(f"old occurs {count if old else 'everywhere'} times; expected once")
        after = whole.replace(old, new)
        others = sum(len(text) for name, text in self._files.items() if name != path)
        if others + len(after) > MOST_CHARACTERS:
            raise _Refused(f"the files would have more than {MOST_CHARACTERS} characters")
        self._files[path] = after
        return "replaced"


def _arguments(call: ToolCall) -> dict[str, Any]:
    if call.name not in _TOOLS:
        raise _Refused(f"no tool {call.name[:80]!r}; there are {', '.join(_TOOLS)}")
    try:
        found = json.loads(call.arguments, parse_constant=no_constant)
        call.arguments.encode()
    except (ValueError, RecursionError) as problem:
        raise _Refused(f"the arguments are not JSON: {problem}"[:200]) from None
    properties = _TOOLS[call.name][1]
    if not isinstance(found, dict) or set(found) != set(properties):
        raise _Refused(f"expected the arguments {', '.join(properties) or 'none'}")
    for name, schema in properties.items():
        kind = str if schema is _TEXT else int
        if not isinstance(found[name], kind) or isinstance(found[name], bool):
            raise _Refused(f"{name} is {type(found[name]).__name__}; expected {kind.__name__}")
    return found
