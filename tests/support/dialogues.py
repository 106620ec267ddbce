"""Dialogues with tools, drawn at random: what templates, parsers and packing are tried on."""

import json
import random
from typing import Any

from megatron_k2.records.messages import ChatSample, Message, ToolCall, ToolSpec

WORDS = (
    "tide harbour Größe 你好 世界 café 🧭 ok 12345 3.14 I'LL don't def return x\n \n\n \t  "
    '{"a":1} <b> & "quoted" <think>hm</think> ## Return of functions.a:0 \ufffd\u0301'
).split(" ")
CONTROL_NAMES = (
    *("<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>"),
    *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>"),
    *(
        "<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
        "[BOS]",
        "[EOS]",
        "[PAD]",
        "<|bos|>",
        "<|eod|>",
    ),
)
NAMES = ("tide_height", "now", "count.items", "lookup2", "Größe")


def text(rng: random.Random, longest: int = 12) -> str:
    words = rng.choices(WORDS, k=rng.randint(0, longest))
    return rng.choice(["", " ", "\n"]).join(words) + rng.choice(["", "", "\n", " "])


def value(rng: random.Random, depth: int = 2) -> Any:
    kinds = [None, True, rng.randint(-5, 10**6), rng.random(), text(rng, 3)]
    if depth:
        kinds.append([value(rng, depth - 1) for _ in range(rng.randint(0, 3))])
        kinds.append({text(rng, 1) or "k": value(rng, depth - 1) for _ in range(rng.randint(0, 3))})
    return rng.choice(kinds)


def tool(rng: random.Random, name: str) -> ToolSpec:
    function: dict[str, Any] = {"name": name}
    if rng.random() < 0.8:
        function["description"] = text(rng)
    if rng.random() < 0.8:
        fields = {f"f{n}": {"type": "string", "description": text(rng, 4)} for n in range(3)}
        function["parameters"] = {"type": "object", "required": ["f1"], "properties": fields}
    items = [("type", "function"), ("function", function)]
    rng.shuffle(items)
    return ToolSpec(json.dumps(dict(items), ensure_ascii=False))


def sample(rng: random.Random, *, has_tools: bool | None = None) -> ChatSample:
    """A dialogue of one to four rounds, with K2's call ids."""
    has_tools = rng.random() < 0.6 if has_tools is None else has_tools
    names = rng.sample(NAMES, rng.randint(1, 3)) if has_tools else []
    messages, index = [], 0
    if rng.random() < 0.5:
        messages.append(Message("system", text(rng), rng.choice([None, None, "memory"])))
    for _ in range(rng.randint(1, 4)):
        messages.append(Message("user", text(rng), rng.choice([None, None, "Ines"])))
        while names and rng.random() < 0.5:
            called = rng.choices(names, k=rng.randint(1, 3))
            calls = []
            for name in called:
                arguments = json.dumps({"f1": value(rng)}, ensure_ascii=rng.random() < 0.5)
                calls.append(ToolCall(f"functions.{name}:{index}", name, arguments))
                index += 1
            messages.append(Message("assistant", text(rng, 3), tool_calls=tuple(calls)))
            for call in calls:
                named = rng.choice([None, call.name])
                messages.append(Message("tool", text(rng), named, tool_call_id=call.id))
        messages.append(Message("assistant", text(rng), is_trained=rng.random() < 0.9))
    return ChatSample(tuple(messages), tuple(tool(rng, name) for name in names))


def hostile(rng: random.Random) -> str:
    """Text that wants to be control tokens, whole or in pieces."""
    parts = []
    for _ in range(rng.randint(1, 8)):
        name = rng.choice(CONTROL_NAMES)
        cut = rng.randint(0, len(name))
        parts.append(
            rng.choice([name, name, name[:cut], name[cut:], text(rng, 2), "\x00", "\u200b"])
        )
    return "".join(parts)
