"""Ids of tool calls: K2's ``functions.{name}:{index}``, and what else is met in their place.

The index counts all calls of a dialogue from 0 (report, appendix B). Released templates print an id
as it is given, and the name of the function stands nowhere else, so an id of another form loses it
and teaches a model bad ids; Moonshot's own API rewrites them before rendering.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from megatron_k2.records.messages import Message, ToolCall, ToolSpec

_EXACT = re.compile(r"functions\.(.+):\d+", re.DOTALL)
"""Any name: what a renderer of ours may have written."""
_STRICT = re.compile(r"functions\.([\w.]+):\d+")
"""Moonshot's guidance; third parties allow more, and names with a hyphen fail here."""
_PREFIXED = re.compile(r"functions?[._:]+(.+?)[:_]\d+", re.DOTALL)
_UNPREFIXED = re.compile(r"([^\s:]+):\d+")
_COUNTER = re.compile(r"(?:(?:functions?|call|tool|tool_call|toolcall|chatcmpl-tool)?[._:-]*)\d+")


def call_id(name: str, index: int) -> str:
    """K2's id of a dialogue's call number ``index``."""
    return f"functions.{name}:{index}"


def exact_name(identity: str) -> str | None:
    """The function's name in an id of K2's form, whatever letters it has."""
    found = _EXACT.fullmatch(identity)
    return found[1] if found else None


def strict_name(identity: str) -> str | None:
    """The function's name where the id passes Moonshot's own expression."""
    found = _STRICT.fullmatch(identity)
    return found[1] if found else None


def guessed_name(identity: str, tools: Sequence[ToolSpec] = ()) -> tuple[str, str]:
    """A name for an id of another form, and what is wrong with it.

    Args:
        identity: As a model or a client wrote it.
        tools: Those that were declared: a bare counter can only mean the single one.

    Returns:
        Name, ``""`` where it cannot be told; kind of finding.
    """
    declared = {tool.name for tool in tools}
    if identity in declared:
        return identity, "no_index"
    if (name := exact_name(identity)) is not None:
        return name, "name_outside_expression"
    if _COUNTER.fullmatch(identity):
        return (declared.pop() if len(declared) == 1 else ""), "bare_counter"
    if found := _PREFIXED.fullmatch(identity):
        return found[1], "underscores_in_id"
    if found := _UNPREFIXED.fullmatch(identity):
        return found[1], "no_prefix"
    return "", "foreign_id"


def number_calls(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The dialogue with K2's ids: calls counted from 0, each result named by its call's new id.

    A client that starts to count again in every turn reuses ids; a result then answers the last
    call of that id.

    Raises:
        ValueError: a result answers no earlier call.
    """
    numbered, index = [], 0
    current: dict[str, str] = {}
    for place, message in enumerate(messages, start=1):
        if message.tool_calls:
            calls = []
            for call in message.tool_calls:
                calls.append(ToolCall(call_id(call.name, index), call.name, call.arguments))
                current[call.id] = calls[-1].id
                index += 1
            message = replace(message, tool_calls=tuple(calls))
        elif message.tool_call_id is not None:
            if message.tool_call_id not in current:
                raise ValueError(
                    f"message {place}: no earlier call has the id {message.tool_call_id!r}"
                )
            message = replace(message, tool_call_id=current[message.tool_call_id])
        numbered.append(message)
    return tuple(numbered)
