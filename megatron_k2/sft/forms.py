"""Public forms of a dialogue to ``ChatSample``: OpenAI's and ShareGPT's; any other is named.

ShareGPT's ``{"conversations": [{"from": "human", "value": …}]}`` has no ids for calls: a
``function_call`` turn holds ``{"name", "arguments"}`` as JSON (or a list of them), and the next
``observation`` answers it.
"""

import json
from typing import Any

from megatron_k2.chat.call_ids import call_id
from megatron_k2.records.messages import ChatSample
from megatron_k2.records.read import sample_from

_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
    "function_call": "function_call",
}
OTHER_FORMS = {
    "instruction": "Alpaca's instruction and output",
    "prompt": "prompt and completion",
    "chosen": "pairs of preference",
    "text": "plain text",
}
"""A key that tells of a form which is not read."""


def check_form(row: dict[str, Any]) -> None:
    """Refuse a row of another form.

    Raises:
        ValueError: names the form or the keys, and the two that are read.
    """
    if "messages" in row or "conversations" in row:
        return
    known = next((name for key, name in OTHER_FORMS.items() if key in row), None)
    keys = ", ".join(map(str, list(row)[:8])) or "none"
    found = f"the form is {known}" if known else f"the keys are {keys}"
    raise ValueError(
        f"{found}; read are OpenAI's 'messages' and ShareGPT's 'conversations': convert the rows"
    )


def sample_of(row: dict[str, Any]) -> ChatSample:
    """A row of either form.

    Raises:
        ValueError: says what is wrong with it.
    """
    check_form(row)
    if "messages" in row:
        return sample_from(_with_parsed_tools(row))
    return sample_from(_from_sharegpt(row))


def _with_parsed_tools(row: dict[str, Any]) -> dict[str, Any]:
    """Tools that stand as a string of JSON (tables have no column of any shape) as a list."""
    tools = row.get("tools")
    if not isinstance(tools, str):
        return row
    try:
        parsed = json.loads(tools) if tools.strip() else []
    except (ValueError, RecursionError):
        raise ValueError("tools is a string that is not JSON") from None
    return row | {"tools": [_wrapped(tool) for tool in parsed] if isinstance(parsed, list) else 0}


def _wrapped(tool: Any) -> Any:
    """A bare function as OpenAI's tool."""
    is_bare = isinstance(tool, dict) and "function" not in tool and "name" in tool
    return {"type": "function", "function": tool} if is_bare else tool


def _from_sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("conversations is not a list of objects")
    messages: list[dict[str, Any]] = []
    if row.get("system"):
        messages.append({"role": "system", "content": row["system"]})
    waiting: list[str] = []
    num_calls = 0
    for number, turn in enumerate(turns, start=1):
        speaker = turn.get("from")
        role = _ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise ValueError(
                f"turn {number}: from {speaker!r}; expected one of {', '.join(_ROLES)}"
            )
        if role == "function_call":
            calls = _sharegpt_calls(turn.get("value"), number, num_calls)
            num_calls += len(calls)
            waiting = [call["id"] for call in calls]
            messages.append({"role": "assistant", "tool_calls": calls})
            continue
        message = {"role": role, "content": turn.get("value")}
        if role == "tool":
            if not waiting:
                raise ValueError(f"turn {number}: an observation that answers no function_call")
            message["tool_call_id"] = waiting.pop(0)
        elif role == "assistant" and turn.get("weight") is not None:
            message["weight"] = turn["weight"]
        messages.append(message)
    kept: dict[str, Any] = {k: row[k] for k in ("id", "weight", "source", "tools") if k in row}
    return _with_parsed_tools(kept | {"messages": messages})


def _sharegpt_calls(value: Any, turn: int, first: int) -> list[dict[str, Any]]:
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise ValueError(f"turn {turn}: a function_call that is not JSON") from None
    found = found if isinstance(found, list) else [found]
    if not found or not all(isinstance(f, dict) and isinstance(f.get("name"), str) for f in found):
        raise ValueError(f"turn {turn}: a function_call without a name")
    return [
        {
            "id": call_id(function["name"], first + index),
            "function": {"name": function["name"], "arguments": function.get("arguments", {})},
        }
        for index, function in enumerate(found)
    ]
