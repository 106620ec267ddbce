"""What an answer may be, as a grammar over tokens: the report's "enforcer" (appendix B).

Lark, in llguidance's form: ``<[7]>`` is the token 7, ``%json`` a schema's values, a string its
letters. Control tokens stand in the grammar where the template writes them, and letters never match
one, so none can come inside a JSON string.
"""

import json
from collections.abc import Sequence
from typing import Any

from megatron_k2.chat import control
from megatron_k2.chat.call_ids import call_id
from megatron_k2.errors import UserError
from megatron_k2.records.messages import ToolSpec

MAX_CALLS = 16
"""Of one answer, where several are allowed: a model that never stops calling is stopped."""
MAX_LETTERS = 1 << 16
"""Of a grammar: what is compiled in tenths of a second."""
_FORM = {"x-guidance": {"whitespace_flexible": False}}
"""One way to write each value, without white space that a model could repeat for ever."""


def values_grammar(schema: dict[str, Any]) -> str:
    """An answer that is one JSON value.

    Raises:
        UserError: the schema refers to itself, or is too long.
    """
    return _bounded(f"start: %json {_json(schema, 'response_format')}\n")


def calls_grammar(
    tools: Sequence[ToolSpec],
    ids: dict[str, int],
    first: int,
    *,
    is_parallel: bool = True,
    may_talk: bool = False,
) -> str:
    """An answer that calls tools: template tokens forced, arguments by the declared schemas.

    Args:
        tools: those that may be called.
        ids: of the control tokens.
        first: calls of the dialogue so far; K2 counts on from there.
        is_parallel: whether there may be more than one.
        may_talk: whether text may come before the calls, or instead of them.

    Raises:
        UserError: a schema is not an object's, refers to itself, or all are too long.
    """
    begin, end = (f"<[{ids[n]}]>" for n in (control.SECTION_BEGIN, control.SECTION_END))
    count = MAX_CALLS if is_parallel else 1
    lines = ["start: TEXT? section?\nTEXT: /(?s:.+)/" if may_talk else "start: section"]
    lines.append(f"section: {begin} calls_0 {end}")
    for place in range(count):
        more = f" calls_{place + 1}?" if place + 1 < count else ""
        lines.append(f"calls_{place}: {_call(tools, ids, first + place)}{more}")
    for number, tool in enumerate(tools):
        lines.append(f"arguments_{number}: %json {_arguments(tool)}")
    return _bounded("\n".join(lines) + "\n")


def _call(tools: Sequence[ToolSpec], ids: dict[str, int], index: int) -> str:
    """One call's right-hand side, the call being the dialogue's number ``index``."""
    begin, middle, end = (
        f"<[{ids[name]}]>"
        for name in (control.CALL_BEGIN, control.ARGUMENT_BEGIN, control.CALL_END)
    )
    choices = [
        f"{json.dumps(call_id(tool.name, index), ensure_ascii=False)} {middle} arguments_{number}"
        for number, tool in enumerate(tools)
    ]
    return f"{begin} ({' | '.join(choices)}) {end}"


def _arguments(tool: ToolSpec) -> str:
    where = f"parameters of tool '{tool.name}'"
    schema = tool.function.get("parameters")
    schema = {} if schema is None else schema
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise UserError(f"{where}: expected a JSON schema of type object")
    return _json({"type": "object"} | schema, where)


def _json(schema: dict[str, Any], where: str) -> str:
    try:
        refers_to_itself = is_recursive(schema)
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None
    if refers_to_itself:
        raise UserError(
            f"{where}: the schema refers to itself, so that an answer need never end; write the "
            "levels out"
        )
    return json.dumps(schema | _FORM, ensure_ascii=False)


def _bounded(grammar: str) -> str:
    if len(grammar) > MAX_LETTERS:
        raise UserError(
            f"schemas of {len(grammar):,} letters as a grammar; up to {MAX_LETTERS:,} are enforced"
        )
    return grammar


def is_recursive(schema: dict[str, Any]) -> bool:
    """Whether a reference within the schema leads back to itself."""
    done: set[str] = set()

    def visit(value: Any, above: tuple[str, ...]) -> bool:
        if isinstance(value, list):
            return any(visit(item, above) for item in value)
        if not isinstance(value, dict):
            return False
        target = value.get("$ref")
        if isinstance(target, str) and target.startswith("#") and target not in done:
            if target in above or _is_root(target):
                return True
            if visit(_found(schema, target), (*above, target)):
                return True
            done.add(target)
        return any(visit(item, above) for item in value.values())

    return visit(schema, ())


def _is_root(target: str) -> bool:
    return target in ("#", "#/")


def _found(schema: dict[str, Any], target: str) -> Any:
    """What a reference within a schema names; nothing where it names nothing."""
    value: Any = schema
    for part in target.removeprefix("#/").split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        value = value.get(name) if isinstance(value, dict) else None
    return value
