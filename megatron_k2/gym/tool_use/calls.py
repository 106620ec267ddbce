"""One call of a tool: its name, its arguments as text, checked, executed, answered as JSON text.

Whatever a model writes is answered; an error is an answer too, and changes nothing.
"""

import functools
import json
from typing import Any

from megatron_k2.gym.tool_use.calendar import TOOLS, Refused, State, changed
from megatron_k2.records.messages import ToolCall, ToolSpec
from megatron_k2.records.read import no_constant, tool_from


def schema_of(name: str) -> dict[str, Any]:
    """JSON schema of a tool's arguments."""
    properties = TOOLS[name][2]
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


@functools.cache
def tool_specs() -> tuple[ToolSpec, ...]:
    """What a model is told of the tools."""
    return tuple(
        tool_from(
            {
                "type": "function",
                "function": {
                    "name": name,
                    "description": description,
                    "parameters": schema_of(name),
                },
            }
        )
        for name, (_, description, _) in TOOLS.items()
    )


def missing() -> str | None:
    """Why no argument can be checked here; ``None`` where it can."""
    try:
        import jsonschema  # noqa: F401
    except ImportError:
        return (
            "arguments of tools are checked by jsonschema, which is not installed; "
            "pip install 'megatron-k2[gym]'"
        )
    return None


@functools.cache
def _validator(name: str) -> Any:
    import jsonschema

    return jsonschema.Draft202012Validator(schema_of(name))


def answered(state: State, call: ToolCall) -> tuple[State, str]:
    """The state after a call, and the text that the caller reads."""
    try:
        after, value = changed(state, call.name, _arguments(call))
        return after, json.dumps(value, ensure_ascii=False)
    except Refused as answer:
        return state, json.dumps({"error": str(answer)}, ensure_ascii=False)


def _arguments(call: ToolCall) -> dict[str, Any]:
    if call.name not in TOOLS:
        raise Refused(f"no tool {call.name[:80]!r}; there are {', '.join(TOOLS)}")
    try:
        found = json.loads(call.arguments, parse_constant=no_constant)
        call.arguments.encode()
    except (ValueError, RecursionError) as problem:
        raise Refused(f"the arguments are not JSON: {problem}"[:200]) from None
    error = next(_validator(call.name).iter_errors(found), None)
    if error is not None:
        place = "/".join(map(str, error.absolute_path)) or "arguments"
        raise Refused(f"{place}: {error.message}"[:200])
    return found
