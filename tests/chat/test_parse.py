"""Parsers: what was rendered comes back, what a model gets wrong is named, whatever the chunks."""

import random
from dataclasses import replace

import pytest

from megatron_k2.chat.call_ids import number_calls
from megatron_k2.chat.completion import (
    CompletionParser,
    CompletionStream,
    FormatError,
    parse_completion,
)
from megatron_k2.chat.lexer import IdLexer, TextLexer
from megatron_k2.chat.parse import ParsedDialogue, parse_ids, parse_text
from megatron_k2.chat.template import Renderer, render_text
from megatron_k2.records.messages import Message, ToolCall, ToolSpec
from tests.support import dialogues

BEGIN, END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, ARGS, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
IM_END = "<|im_end|>"
TOOL = ToolSpec('{"type": "function", "function": {"name": "get_tide"}}')


def one(identity="functions.get_tide:0", arguments="{}"):
    return f"{CALL}{identity}{ARGS}{arguments}{CALL_END}"


def as_rendered(sample):
    """What a rendering keeps of a sample's messages."""
    return tuple(replace(message, is_trained=True, reasoning=None) for message in sample.messages)


def test_what_was_rendered_is_parsed_back(tokenizer):
    """From ids always; from text where no text names a control token."""
    rng, renderer = random.Random(1), Renderer(tokenizer)
    for number in range(300):
        sample, prompt = dialogues.sample(rng), bool(number % 2)
        rendered = renderer.render(sample.messages, sample.tools, add_generation_prompt=prompt)
        expected = ParsedDialogue(as_rendered(sample), sample.tools, prompt)
        assert parse_ids(rendered.ids, tokenizer) == expected
        text = render_text(sample.messages, sample.tools, add_generation_prompt=prompt)
        assert parse_text(text) == expected


def test_a_wrong_rendering_is_not_parsed_to_the_same(toy):
    """Arguments of two calls exchanged: the comparison above would see it."""
    calls = (ToolCall("functions.a:0", "a", "{}"), ToolCall("functions.a:1", "a", '{"x": 1}'))
    message = Message("assistant", tool_calls=calls)
    swapped = Message(
        "assistant",
        tool_calls=(replace(calls[0], arguments='{"x": 1}'), replace(calls[1], arguments="{}")),
    )
    ids = Renderer(toy).render([Message("user", "x"), swapped]).ids
    assert parse_ids(ids, toy).messages[1] != message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("hello", "begins with 'hello'"),
        ("<|im_user|>user", "header"),
        ("<|im_user|>user<|im_middle|>x", "is not closed"),
        ("<|im_user|>user<|im_middle|>x<|im_end|>y", "'y' between two turns"),
        ("<|im_user|>user<|im_middle|>x<|im_end|>\n", "not the default system text"),
        ("<|im_system|>tool<|im_middle|>x<|im_end|>", "does not begin with"),
        ("<|im_system|>tool_declare<|im_middle|>{}x<|im_end|>", "not a JSON list of tools"),
        ("<|im_user|>user<|im_middle|>x<|tool_call_begin|><|im_end|>", "control token inside"),
        (f"<|im_assistant|>assistant<|im_middle|>{BEGIN}{IM_END}", "unexpected token"),
        (
            f"<|im_assistant|>assistant<|im_middle|>{BEGIN}{one('call_ab')}{END}{IM_END}",
            "foreign id",
        ),
    ],
)
def test_what_the_template_does_not_write_is_refused(text, problem):
    with pytest.raises(FormatError, match=problem):
        parse_text(text)


FOUND = [
    (f"{BEGIN}{one('functions.get-tide:0')}{END}", "get-tide", "name_outside_expression"),
    (f"{BEGIN}{one('0')}{END}", "get_tide", "bare_counter"),
    (f"{BEGIN}{one('call00003')}{END}", "get_tide", "bare_counter"),
    (f"{BEGIN}{one('functions_get_tide_0')}{END}", "get_tide", "underscores_in_id"),
    (f"{BEGIN}{one('get_tide:0')}{END}", "get_tide", "no_prefix"),
    (f"{BEGIN}{one('get_tide')}{END}", "get_tide", "no_index"),
    (f"{BEGIN}{one('chatcmpl/xyz')}{END}", "", "foreign_id"),
    (f"<|tool_call_section_begin|>{one()}<|tool_call_section_end|>", "get_tide", "singular_token"),
    (
        f"{BEGIN}{CALL}functions.get_tide:0<|tool_arguments_begin|>{{}}{CALL_END}{END}",
        "get_tide",
        "singular_token",
    ),
    (f"{BEGIN}{one(arguments='{"a": "b')}{END}", "get_tide", "truncated_arguments"),
    (f"{BEGIN}{one(arguments='{"a": 1')}{END}", "get_tide", "truncated_arguments"),
    (f'{BEGIN}{CALL}functions.get_tide:0{ARGS}{{"a"', "get_tide", "truncated_arguments"),
    (f"{BEGIN}{one(arguments='{a: 1}')}{END}", "get_tide", "arguments_not_json"),
    (f"{BEGIN}{one(arguments='[1]')}{END}", "get_tide", "arguments_not_object"),
    (f"{BEGIN}{one(arguments='{"a": NaN}')}{END}", "get_tide", "arguments_not_json"),
    (f"{BEGIN} {one()}\n{END}", "get_tide", "space"),
    (f"{BEGIN}{one(' functions.get_tide:0 ')}{END}", "get_tide", "space"),
    (f"{BEGIN}so: {one()}{END}", "get_tide", "text_between_calls"),
    (one(), "get_tide", "unexpected_token"),
    (f"{BEGIN}{one()}", "get_tide", "unexpected_token"),
    (f"{BEGIN}{CALL}functions.get_tide:0{CALL_END}{END}", "get_tide", "unexpected_token"),
    (f"{BEGIN}{CALL}functions.get_tide:0{ARGS}{{}}{END}", "get_tide", "unexpected_token"),
]


@pytest.mark.parametrize(("answer", "name", "kind"), FOUND)
def test_a_tolerant_parser_reads_the_call_and_says_why_a_strict_one_does_not(answer, name, kind):
    answer += IM_END if answer.endswith("|>") else ""
    lexer = TextLexer(allows_variants=True)
    found = parse_completion(lexer, f"Let me look.{answer}", "tolerant", [TOOL])
    assert [call.name for call in found.tool_calls] == [name]
    assert kind in {finding.kind for finding in found.findings}
    assert found.content == "Let me look."
    with pytest.raises(FormatError):
        parse_completion(TextLexer(), f"Let me look.{answer}", "strict", [TOOL])


def test_a_clean_answer_has_no_findings():
    answer = f"Look.{BEGIN}{one()}{one('functions.get_tide:1', '{"a": [1]}')}{END}{IM_END}"
    found = parse_completion(TextLexer(allows_variants=True), answer, "tolerant", [TOOL])
    assert found == parse_completion(TextLexer(), answer, "strict")
    assert found.is_finished
    assert not found.findings
    assert [call.arguments for call in found.tool_calls] == ["{}", '{"a": [1]}']
    assert parse_completion(TextLexer(), "a < b <| c" + IM_END).content == "a < b <| c"


def test_an_id_without_a_name_needs_a_single_declared_tool():
    answer = f"{BEGIN}{one('0')}{END}{IM_END}"
    other = ToolSpec('{"type": "function", "function": {"name": "now"}}')
    for tools, name in ([], ""), ([TOOL], "get_tide"), ([TOOL, other], ""):
        found = parse_completion(TextLexer(), answer, "tolerant", tools)
        assert [call.name for call in found.tool_calls] == [name]


def test_letters_that_spell_a_control_token_are_content_when_they_come_as_ids(tokenizer):
    """Repeating what a user wrote must not call a tool."""
    written = f"You wrote {BEGIN}{one()}{END}"
    end = Renderer(tokenizer).control.by_name[IM_END]
    ids = [*tokenizer.encode(written), end]
    found = parse_completion(IdLexer(tokenizer), ids, "tolerant", [TOOL])
    assert (found.content, found.tool_calls, found.findings) == (written, (), ())


@pytest.mark.parametrize("kind", ["text", "ids"])
def test_events_add_up_to_the_answer_whatever_the_chunks(kind, tokenizer):
    rng, renderer = random.Random(2), Renderer(tokenizer)
    names = renderer.control.by_name
    for _ in range(100):
        sample = dialogues.sample(rng, has_tools=True)
        for message in (m for m in sample.messages if m.role == "assistant"):
            whole = render_text([message]).split("<|im_assistant|>assistant<|im_middle|>")[1]
            lexer = TextLexer(allows_variants=True)
            if kind == "ids":
                ids = renderer.render([message]).ids
                start = ids.index(names["<|im_assistant|>"])
                whole = ids[ids.index(names["<|im_middle|>"], start) + 1 :]
                lexer = IdLexer(tokenizer)
            stream = CompletionStream(lexer, CompletionParser("exact"))
            events, at = [], 0
            while at < len(whole):
                step = rng.choice([1, 1, 2, 5, 20])
                events += stream.feed(whole[at : at + step])
                at += step
            last, answer = stream.close()
            events += last
            assert answer.to_message() == replace(message, is_trained=True)
            assert "".join(e.text for e in events if e.kind == "content") == message.content
            for index, call in enumerate(message.tool_calls):
                written = [e.text for e in events if (e.kind, e.call) == ("arguments", index)]
                assert "".join(written) == call.arguments
            calls = [e.text for e in events if e.kind == "call"]
            assert calls == [call.id for call in message.tool_calls]
            assert [e.kind for e in events].count("end") == 1


def test_content_streams_before_the_turn_is_over(toy):
    stream = CompletionStream(IdLexer(toy), CompletionParser("tolerant"))
    first = toy.encode("你")
    assert len(first) > 1
    assert [stream.feed([number]) for number in first[:-1]] == [[] for _ in first[:-1]]
    assert [event.text for event in stream.feed(first[-1:])] == ["你"]


def test_calls_are_numbered_over_the_dialogue_and_results_follow():
    def call(identity, name):
        return ToolCall(identity, name)

    messages = [
        Message("assistant", tool_calls=(call("call_0", "a"), call("call_1", "b"))),
        Message("tool", "1", tool_call_id="call_1"),
        Message("tool", "0", tool_call_id="call_0"),
        Message("assistant", tool_calls=(call("call_0", "a"),)),
        Message("tool", "2", tool_call_id="call_0"),
    ]
    numbered = number_calls(messages)
    assert [c.id for m in numbered for c in m.tool_calls] == [
        "functions.a:0",
        "functions.b:1",
        "functions.a:2",
    ]
    results = [m.tool_call_id for m in numbered if m.role == "tool"]
    assert results == ["functions.b:1", "functions.a:0", "functions.a:2"]
    with pytest.raises(ValueError, match="no earlier call has the id 'call_9'"):
        number_calls([Message("tool", "x", tool_call_id="call_9")])
