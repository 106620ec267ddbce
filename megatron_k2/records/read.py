"""JSON to records, every complaint naming what is wrong; files line by line.

A sample's line is OpenAI's ``{"messages": […], "tools": […]}``, with ``id``, ``weight`` and
``source`` where given. Numbers that JSON does not have (NaN), text that UTF-8 does not have (a lone
surrogate) and content that is not text are refused.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.records.messages import SCHEMA_VERSION, ChatSample, Message, ToolCall, ToolSpec


def no_constant(name: str) -> Any:
    """For ``json.loads(parse_constant=…)``: what Python reads beyond JSON is refused.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{name} is not JSON; leave it out or write null")


def read_json_line(line: bytes | str) -> dict[str, Any]:
    """The object on a line.

    Raises:
        ValueError: it is not UTF-8, not JSON, or not an object.
    """
    try:
        text = line.decode("utf-8") if isinstance(line, bytes) else line
        value = json.loads(text.rstrip(), parse_constant=no_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not JSON that can be read: nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return value


def _text(value: Any, what: str) -> str:
    """A string, a list of text parts joined, or ``""`` for null."""
    if value is None:
        return ""
    if isinstance(value, list):
        return "".join(_part(part, what) for part in value)
    if not isinstance(value, str):
        raise ValueError(f"{what} is {type(value).__name__}; expected a string")
    return _encodable(value, what)


def _part(part: Any, what: str) -> str:
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if kind != "text":
        raise ValueError(f"{what} has a part of type {kind!r}; K2 reads text only")
    return _text(part.get("text"), what)


def _encodable(text: str, what: str) -> str:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{what} has a lone surrogate at character {error.start}") from None
    return text


def _optional(value: Any, what: str) -> str | None:
    """A string that is not empty; an empty one is what templates take for none."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{what} is {type(value).__name__}; expected a string")
    return _encodable(value, what) if value else None


def _objects(value: Any, what: str) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{what} is not a list of objects")
    return value


def tool_call_from(found: dict[str, Any], what: str = "tool_calls") -> ToolCall:
    """A call in OpenAI's form; arguments that are an object are written as ``json.dumps`` does.

    Raises:
        ValueError: no name, or arguments of another type.
    """
    function = found.get("function")
    if not isinstance(function, dict):
        raise ValueError(f"{what} has no function object")
    name = _optional(function.get("name"), f"{what}: name")
    if name is None:
        raise ValueError(f"{what} has no function name")
    arguments = function.get("arguments", "")
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if isinstance(arguments, list):
        raise ValueError(f"{what}: arguments are a list; expected an object or a string")
    text = _text(arguments, f"{what}: arguments")
    return ToolCall(id=_optional(found.get("id"), f"{what}: id") or "", name=name, arguments=text)


def message_from(found: dict[str, Any]) -> Message:
    """A message in OpenAI's form.

    Raises:
        ValueError: see ``Message``; also for content that is not text.
    """
    role = found.get("role")
    calls = tuple(tool_call_from(call) for call in _objects(found.get("tool_calls"), "tool_calls"))
    weight = found.get("weight", 1)
    if weight not in (0, 1):
        raise ValueError(f"a message's weight is {weight!r}; expected 0 or 1")
    if isinstance(role, str) and role != "assistant":
        weight = 1
    return Message(
        role=role,  # type: ignore[arg-type]  # Message refuses what is no role
        content=_text(found.get("content"), "content"),
        name=_optional(found.get("name"), "name"),
        tool_calls=calls,
        tool_call_id=_optional(found.get("tool_call_id"), "tool_call_id"),
        reasoning=_optional(found.get("reasoning_content"), "reasoning_content"),
        is_trained=bool(weight),
    )


def tool_from(found: dict[str, Any]) -> ToolSpec:
    """A tool in OpenAI's form.

    Raises:
        ValueError: no function with a name.
    """
    function = found.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError(
            'a tool without a name; expected {"type": "function", "function": {"name": …}}'
        )
    return ToolSpec(_encodable(json.dumps(found, ensure_ascii=False), "a tool"))


def tools_from(value: Any) -> tuple[ToolSpec, ...]:
    """A list of tools in OpenAI's form; null is none.

    Raises:
        ValueError: see ``tool_from``.
    """
    return tuple(tool_from(tool) for tool in _objects(value, "tools"))


def sample_from(found: dict[str, Any]) -> ChatSample:
    """A sample in OpenAI's form.

    Raises:
        ValueError: says which message, and what is wrong with it.
    """
    try:
        return _sample_from(found)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except OverflowError:
        raise ValueError("weight is too large; expected a number") from None


def _sample_from(found: dict[str, Any]) -> ChatSample:
    version = found.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise ValueError(f"schema_version {version!r}, expected {SCHEMA_VERSION}")
    messages = []
    for number, message in enumerate(_objects(found.get("messages"), "messages"), start=1):
        try:
            messages.append(message_from(message))
        except ValueError as problem:
            raise ValueError(f"message {number}: {problem}") from None
    identity = found.get("id")
    if type(identity) is int:  # a row's number, in many public sets
        identity = str(identity)
    weight = found.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ValueError(f"weight is {weight!r}; expected a number")
    return ChatSample(
        messages=tuple(messages),
        tools=tools_from(found.get("tools")),
        id=_optional(identity, "id") or "",
        weight=float(weight),
        source=_optional(found.get("source"), "source") or "",
    )


def read_samples(path: Path) -> Iterator[ChatSample]:
    """Samples of a ``.jsonl`` file; blank lines are skipped.

    Raises:
        UserError: a bad line, named with file and line number.
    """
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.isspace():
                continue
            try:
                yield sample_from(read_json_line(line))
            except ValueError as problem:
                raise UserError(f"{path}:{number}: {problem}") from None
