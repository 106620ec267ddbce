"""Answers that must be JSON of a schema: read tolerantly, checked here whatever the server did."""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from megatron_k2.errors import UserError

_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n[ \t]*```", re.DOTALL)
LONGEST_PROBLEM = 300
"""Characters of a problem that go into a repair turn or a record."""


class SchemaError(ValueError):
    """An answer is not what was asked for; the message says where."""


@lru_cache(maxsize=64)
def _validator(schema: str) -> Any:
    try:
        from jsonschema import Draft202012Validator
    except ImportError:
        raise UserError(
            "jsonschema is not installed; pip install 'megatron-k2[synthesis]'"
        ) from None
    return Draft202012Validator(json.loads(schema))


def response_format(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The field of a request by which servers hold a model to a schema."""
    return {
        "type": "json_schema",
        "json_schema": {"name": name, "schema": dict(schema), "strict": True},
    }


def read_answer(text: str, schema: Mapping[str, Any]) -> Any:
    """The value of an answer.

    Raises:
        SchemaError: it is no JSON, or not of the schema.
    """
    value = _json_of(text)
    validator = _validator(json.dumps(schema, sort_keys=True))
    problem = next(iter(validator.iter_errors(value)), None)
    if problem is not None:
        place = "/".join(str(part) for part in problem.absolute_path) or "the whole"
        raise SchemaError(f"{place}: {problem.message}"[:LONGEST_PROBLEM])
    return value


def _json_of(text: str) -> Any:
    """JSON alone or in one fence; small models write the fence in spite of everything."""
    fenced = _FENCED.search(text)
    problem = "empty"
    for candidate in (text, fenced[1] if fenced else ""):
        if candidate.strip():
            try:
                value = json.loads(candidate)
                json.dumps(value, ensure_ascii=False).encode()
                return value
            except UnicodeEncodeError:
                problem = "a lone surrogate"
            except (ValueError, RecursionError) as error:
                problem = str(error)
    raise SchemaError(f"not JSON: {problem}"[:LONGEST_PROBLEM])
