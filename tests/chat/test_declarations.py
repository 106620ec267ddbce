"""TypeScript declarations, by the example of the report's appendix B and by hand."""

import json
import sys

import pytest

from megatron_k2.chat.declarations import (
    MAX_DEPTH,
    json_declarations,
    typescript_declarations,
)
from megatron_k2.chat.template import Format, render_text
from megatron_k2.errors import UserError
from megatron_k2.records.messages import Message, ToolSpec

WEATHER = {
    "name": "get_weather",
    "description": "Get weather for a location and date",
    "parameters": {
        "type": "object",
        "required": ["location"],
        "properties": {
            "location": {"type": "string", "description": "City and country e.g. Beijing, China"},
            "date": {"type": "string", "description": "Date to query, format in '%Y-%m-%d'"},
        },
    },
}
ODD = {
    "name": "odd",
    "parameters": {
        "properties": {
            "kind": {"enum": ["a", 1, None]},
            "many": {"type": "array", "items": {"type": ["integer", "null"]}},
            "x-y": {"type": "object", "properties": {"in": {"type": "boolean"}}},
            "free": {},
            "one of": {"anyOf": [{"const": "z"}, {"type": "object"}, "damaged"]},
        }
    },
}


def spec(function):
    return ToolSpec(json.dumps({"type": "function", "function": function}))


def test_the_report_s_form():
    assert typescript_declarations([spec(WEATHER), spec({"name": "now"})]) == (
        "namespace functions {\n"
        "// Get weather for a location and date\n"
        "type get_weather = (_: {\n"
        "  // City and country e.g. Beijing, China\n"
        "  location: string,\n"
        "  // Date to query, format in '%Y-%m-%d'\n"
        "  date?: string\n"
        "}) => any;\n"
        "type now = () => any;\n"
        "}"
    )


def test_schemas_of_other_kinds():
    assert typescript_declarations([spec(ODD)]) == (
        "namespace functions {\n"
        "type odd = (_: {\n"
        '  kind?: "a" | 1 | null,\n'
        "  many?: (number | null)[],\n"
        '  "x-y"?: {\n'
        "    in?: boolean\n"
        "  },\n"
        "  free?: any,\n"
        '  "one of"?: "z" | object | any\n'
        "}) => any;\n"
        "}"
    )


@pytest.fixture(params=[None, 5000])
def recursion_limit(request):
    """The interpreter's own, and a higher one, as torch's compiler sets it in its process."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(request.param or before)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.usefixtures("recursion_limit")
def test_a_schema_without_end_is_refused_by_the_tool_s_name():
    deep: dict = {"type": "string"}
    for _ in range(MAX_DEPTH // 2):
        deep = {"properties": {"a": deep}}
    assert typescript_declarations([spec({"name": "odd", "parameters": deep})]).count("a?") == 100
    deep = {"properties": {"a": deep}}
    with pytest.raises(UserError, match="the parameters of tool odd are nested too deeply"):
        typescript_declarations([spec({"name": "odd", "parameters": deep})])


def test_typescript_stands_where_json_stands():
    message, tool = [Message("system", "s")], [spec(WEATHER)]
    by_json = render_text(message, tool)
    declared = json_declarations(tool, is_sorted=True, is_compact=True)
    expected = by_json.replace(declared, typescript_declarations(tool))
    assert render_text(message, tool, Format(declarations="typescript")) == expected
