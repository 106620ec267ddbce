"""Tool declarations as text: the JSON of each template generation, and the report's TypeScript.

The report (arXiv:2507.20534, appendix B) declares tools in training mainly as TypeScript types in
``namespace functions``, and partly as JSON so that third parties need no converter; the released
templates print JSON only. Where in the turn the namespace stands is not stated for the released
tokens: here directly after ``<|im_middle|>``, as the JSON.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.records.messages import ToolSpec

INDENT = "  "
MAX_DEPTH = 200
"""Objects and lists within one another that a schema may hold: two for each field of a field."""
_PRIMITIVES = {
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "null": "null",
}


def json_declarations(tools: Sequence[ToolSpec], *, is_sorted: bool, is_compact: bool) -> str:
    """The tools as one JSON list, letters outside ASCII as they are.

    Args:
        tools: In order, which stays.
        is_sorted: Whether keys are sorted at every depth, as K2's tokenizer code does from 0905 on.
        is_compact: No space after commas and colons.
    """
    separators = (",", ":") if is_compact else None
    values = [tool.value for tool in tools]
    return json.dumps(values, ensure_ascii=False, sort_keys=is_sorted, separators=separators)


def typescript_declarations(tools: Sequence[ToolSpec]) -> str:
    """``namespace functions { … }``, a type for each tool, its description a comment above it.

    Raises:
        UserError: a schema is nested too deeply.
    """
    lines = ["namespace functions {"]
    for tool in tools:
        lines += _comment(tool.function.get("description"), "")
        parameters = tool.function.get("parameters")
        has_fields = isinstance(parameters, dict) and parameters.get("properties")
        if has_fields and _is_deeper(parameters, MAX_DEPTH):
            raise UserError(
                f"the parameters of tool {tool.name} are nested too deeply: they hold more than "
                f"{MAX_DEPTH} objects and lists within one another; declare it as JSON"
            )
        argument = f"_: {_type(parameters, '')}" if has_fields else ""
        lines.append(f"type {tool.name} = ({argument}) => any;")
    return "\n".join([*lines, "}"])


def _is_deeper(value: Any, limit: int) -> bool:
    """Whether ``value`` holds more than ``limit`` objects and lists within one another."""
    level = [value]
    for _ in range(limit + 1):
        level = [each for each in level if isinstance(each, dict | list)]
        level = [x for each in level for x in (each.values() if isinstance(each, dict) else each)]
    return any(isinstance(each, dict | list) for each in level)


def _comment(text: Any, indent: str) -> list[str]:
    return [f"{indent}// {line}" for line in text.splitlines()] if isinstance(text, str) else []


def _type(schema: Any, indent: str) -> str:
    """A JSON schema as a TypeScript type; what has no type there is ``any``."""
    if not isinstance(schema, dict):
        return "any"
    if isinstance(schema.get("enum"), list):
        return _union(json.dumps(value, ensure_ascii=False) for value in schema["enum"])
    if "const" in schema:
        return json.dumps(schema["const"], ensure_ascii=False)
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            return _union(_type(choice, indent) for choice in schema[key])
    kind = schema.get("type")
    if isinstance(kind, list):
        return _union(_type({**schema, "type": each}, indent) for each in kind)
    if kind == "array":
        element = _type(schema.get("items"), indent)
        return f"({element})[]" if " | " in element else f"{element}[]"
    if isinstance(schema.get("properties"), dict):
        return _fields(schema, indent)
    return "object" if kind == "object" else _PRIMITIVES.get(str(kind), "any")


def _union(choices: Iterable[str]) -> str:
    return " | ".join(dict.fromkeys(choices)) or "any"


def _fields(schema: dict[str, Any], indent: str) -> str:
    inner = indent + INDENT
    required = schema.get("required")
    required = required if isinstance(required, list) else []
    fields = []
    for name, field in schema["properties"].items():
        described = field.get("description") if isinstance(field, dict) else None
        mark = "" if name in required else "?"
        key = name if name.isidentifier() else json.dumps(name, ensure_ascii=False)
        line = f"{inner}{key}{mark}: {_type(field, inner)}"
        fields.append("\n".join([*_comment(described, inner), line]))
    return "{\n" + ",\n".join(fields) + f"\n{indent}}}" if fields else "{}"
