"""Records: OpenAI's form in and out, what is refused, and what a hash covers."""

import json
import random

import pytest

from megatron_k2.errors import UserError
from megatron_k2.records.messages import ChatSample, Message, ToolCall, ToolSpec
from megatron_k2.records.read import read_json_line, read_samples, sample_from
from tests.support import dialogues


def test_a_line_reads_back_as_the_same_sample(tmp_path):
    rng = random.Random(3)
    samples = [dialogues.sample(rng) for _ in range(50)]
    (tmp_path / "samples.jsonl").write_text("".join(s.to_line() for s in samples) + " \n")
    assert list(read_samples(tmp_path / "samples.jsonl")) == samples


def test_the_hash_covers_what_is_trained_and_nothing_else():
    messages = (Message("user", "x"), Message("assistant", "y"))
    sample = ChatSample(messages)
    assert sample.id == sample.content_hash
    same = ChatSample(messages, id="another", source="elsewhere", weight=2.0)
    assert same.content_hash == sample.content_hash
    turned = ToolSpec('{"function": {"name": "a"}, "type": "function"}')
    tool = ToolSpec('{"type": "function", "function": {"name": "a"}}')
    assert turned == tool
    assert (
        ChatSample(messages, (turned,)).content_hash == ChatSample(messages, (tool,)).content_hash
    )
    others = [
        ChatSample(messages, (tool,)),
        ChatSample((messages[0], Message("assistant", "y", is_trained=False))),
        ChatSample((Message("user", "x", "Ines"), messages[1])),
    ]
    assert len({sample.content_hash, *(other.content_hash for other in others)}) == 4


def test_openai_s_looser_forms_become_one():
    call = {"id": "c", "function": {"name": "f", "arguments": {"b": "é", "a": None}}}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    found = sample_from(
        {
            "messages": [
                {"role": "user", "content": parts, "name": ""},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c", "content": parts},
                {"role": "assistant", "content": "x", "weight": 0, "tool_calls": None},
            ],
            "tools": None,
        }
    )
    assert found.messages == (
        Message("user", "ab"),
        Message("assistant", tool_calls=(ToolCall("c", "f", '{"b": "é", "a": null}'),)),
        Message("tool", "ab", tool_call_id="c"),
        Message("assistant", "x", is_trained=False),
    )


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        ({}, "no messages"),
        ({"messages": {}}, "messages is not a list of objects"),
        ({"messages": ["x"]}, "messages is not a list of objects"),
        ({"messages": [USER, {"role": "robot"}]}, "message 2: role 'robot'"),
        ({"messages": [{"role": "user", "content": 7}]}, "message 1: content is int"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url'"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "lone surrogate"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "without tool_call_id"),
        ({"messages": [USER | {"tool_call_id": "a"}]}, "has tool_call_id"),
        ({"messages": [USER | {"tool_calls": [{"function": {"name": "f"}}]}]}, "has tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "no function object"),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "f", "arguments": [1]}}],
                    }
                ]
            },
            "arguments are a list",
        ),
        ({"messages": [{"role": "assistant", "weight": 0.5}]}, "weight is 0.5"),
        ({"messages": [USER], "weight": -1}, "weight -1.0"),
        ({"messages": [USER], "weight": True}, "weight is True"),
        ({"messages": [USER], "weight": 10**400}, "weight is too large"),
        ({"messages": [USER], "tools": [{"name": "f"}]}, "a tool without a name"),
        ({"messages": [USER], "schema_version": 9}, "schema_version 9, expected 1"),
    ],
)
def test_what_is_no_sample_is_refused_by_name(found, problem):
    with pytest.raises(ValueError, match=problem):
        sample_from(found)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "not JSON: Expecting property name"),
        (b"[]", "expected a JSON object, found list"),
        (b'{"messages": NaN}', "NaN is not JSON"),
        (b'{"id": "\xff"}', "not UTF-8 at byte 8"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"messages": [{"role": "user", "content": 7}]}', "content is int"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, problem):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(json.dumps({"messages": [USER]}).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(UserError, match=rf"samples\.jsonl:3: .*{problem}"):
        list(read_samples(path))


def test_numbers_of_thousands_of_digits_are_refused():
    with pytest.raises(ValueError, match="digits"):
        read_json_line('{"weight": ' + "1" * 5000 + "}")
