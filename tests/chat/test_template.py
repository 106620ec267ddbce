"""The template's text, ids and mask against recorded renderings, Jinja and character offsets.

Not exercised: texts over 400,000 characters, which the released tokenizer cuts at places that
count control tokens' letters.
"""

import functools
import json
import random
from dataclasses import replace

import pytest
import tiktoken
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_k2.chat.control import IM_END
from megatron_k2.chat.dialogue import Dialogue
from megatron_k2.chat.jinja import jinja_template
from megatron_k2.chat.template import CANONICAL, Format, Rendered, Renderer, render_text
from megatron_k2.data.tiktoken_tokenizer import TiktokenTokenizer
from megatron_k2.errors import UserError
from megatron_k2.records.messages import ChatSample, Message, ToolCall
from megatron_k2.records.read import message_from, tool_from
from tests.campaigns.hostile_chat import case
from tests.support import dialogues
from tests.support.paths import REPOSITORY, SHARED

K2 = SHARED / "data" / "kimi-k2"
GOLDEN = [
    json.loads(line)
    for line in (REPOSITORY / "tests" / "chat" / "golden_chat.jsonl").read_text().splitlines()
]
PRINTS_A_PYTHON_LIST = "call_content_list"
"""In the first 0905 file; a record's parts are joined where they are read, as in the later file."""


def recorded(generation):
    """Id, messages, tools, prompt, text, ids of each recorded dialogue."""
    template = generation.removesuffix("-first")
    # K2-Thinking's own file writes declarations compact; ``text`` is a port that cannot.
    is_other = generation in ("0905-first", "thinking")
    for row in GOLDEN:
        is_left_out = (generation, row["id"]) == ("0905-first", PRINTS_A_PYTHON_LIST)
        if row["template"] == template and not is_left_out:
            text, ids = (
                row.get(f"alt_{k}", row.get(k)) if is_other else row.get(k) for k in ("text", "ids")
            )
            messages = [message_from(message) for message in row["messages"]]
            tools = [tool_from(tool) for tool in row["tools"] or []]
            yield row["id"], messages, tools, row["add_generation_prompt"], text, ids


@pytest.mark.parametrize(
    ("generation", "number"), [("0905", 45), ("0905-first", 44), ("0711", 30), ("thinking", 45)]
)
def test_text_equals_the_recorded_renderings(generation, number):
    same = 0
    for name, messages, tools, prompt, text, _ in recorded(generation):
        if generation == "0711" and any(message.tool_calls for message in messages):
            with pytest.raises(UserError, match="drops an assistant's tool calls"):
                render_text(messages, tools, Format("0711"))
            continue
        form = Format(generation)
        assert render_text(messages, tools, form, add_generation_prompt=prompt) == text, name
        same += 1
    assert same == number


@pytest.mark.parametrize(("generation", "number"), [("0905", 43), ("0905-first", 42), ("0711", 28)])
def test_ids_equal_the_recorded_ones(k2, generation, number):
    renderer, same = Renderer(k2, Format(generation)), 0
    for name, messages, tools, prompt, _, ids in recorded(generation):
        if ids is None or (generation == "0711" and any(m.tool_calls for m in messages)):
            continue
        assert renderer.render(messages, tools, add_generation_prompt=prompt).ids == ids, name
        same += 1
    assert same == number


def objects(sample: ChatSample):
    return [m.to_object() for m in sample.messages], [t.value for t in sample.tools] or None


def by_jinja(sample: ChatSample, **options):
    """Text and trained character spans, from the exported template in transformers."""
    messages, tools = objects(sample)
    template = jinja_template(has_generation_marks=True)
    texts, spans = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **options,
    )
    return texts[0], spans[0]


def with_offsets(tokenizer, text: str):
    """Ids of the whole text, control tokens by their names, and where each begins in the text."""
    if isinstance(tokenizer, TiktokenTokenizer):
        encoding: tiktoken.Encoding = tokenizer._encoding
        ids = encoding.encode(text, allowed_special="all")
        return ids, encoding.decode_with_offsets(ids)[1]
    theirs = tokenizer._tokenizer
    theirs.encode_special_tokens = False
    try:
        found = theirs.encode(text, add_special_tokens=False)
    finally:
        theirs.encode_special_tokens = True
    return found.ids, [begin for begin, _ in found.offsets]


@functools.cache
def samples(number: int) -> tuple[ChatSample, ...]:
    """Dialogues whose texts name no control token: there the text alone tells everything."""
    rng = random.Random(15)
    found: list[ChatSample] = []
    while len(found) < number:
        sample = dialogues.sample(rng)
        if not any(name in json.dumps(objects(sample)) for name in dialogues.CONTROL_NAMES):
            found.append(sample)
    return tuple(found)


def off_by_one(rendered: Rendered) -> Rendered:
    """A deliberately wrong mask."""
    return Rendered(rendered.ids, [0, *rendered.loss_mask[:-1]])


def without_the_end(renderer: Renderer, rendered: Rendered) -> Rendered:
    """Another one: the turn's end is not learnt."""
    end = renderer.control.by_name[IM_END]
    pairs = zip(rendered.ids, rendered.loss_mask, strict=True)
    return Rendered(rendered.ids, [mask * (token != end) for token, mask in pairs])


def check_against_offsets(tokenizer, number: int) -> None:
    renderer = Renderer(tokenizer)
    wrong = [0, 0]
    for sample in samples(number):
        text, spans = by_jinja(sample)
        assert text == render_text(sample.messages, sample.tools)
        ids, offsets = with_offsets(tokenizer, text)
        mask = [int(any(begin <= at < end for begin, end in spans)) for at in offsets]
        rendered = renderer.render(sample.messages, sample.tools)
        assert (rendered.ids, rendered.loss_mask) == (ids, mask)
        wrong[0] += off_by_one(rendered).loss_mask != mask
        wrong[1] += without_the_end(renderer, rendered).loss_mask != mask
    trained = sum(
        any(m.role == "assistant" and m.is_trained for m in s.messages) for s in samples(number)
    )
    assert wrong == [trained, trained]


def test_ids_and_mask_equal_those_from_character_offsets_on_a_thousand(tokenizer):
    check_against_offsets(tokenizer, 1000)


def test_the_exported_template_has_no_marks_and_the_same_text():
    rng = random.Random(4)
    hostile = [case(rng)[1:] for _ in range(50)]
    for sample in (*samples(20), *(ChatSample(tuple(m), tuple(t)) for m, t in hostile)):
        messages, tools = objects(sample)
        for prompt in (False, True):
            texts, _ = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=jinja_template(),
                add_generation_prompt=prompt,
            )
            ours = render_text(sample.messages, sample.tools, add_generation_prompt=prompt)
            assert texts[0] == ours


def test_the_release_s_own_template_gives_the_same_text():
    """The first release's stands in its tokenizer_config.json."""
    config = K2 / "tokenizer_config.json"
    if not config.is_file():
        pytest.skip(f"Kimi K2's tokenizer files are not at {K2}")
    template = json.loads(config.read_text())["chat_template"]
    compared = 0
    for sample in samples(200):
        if any(message.tool_calls or message.role == "tool" for message in sample.messages):
            continue
        messages, tools = objects(sample)
        texts, _ = render_jinja_template(
            conversations=[messages], tools=tools, chat_template=template
        )
        assert texts[0] == render_text(sample.messages, sample.tools, Format("0711"))
        compared += 1
    assert compared > 50


def test_renderers_gives_the_same_ids(tokenizer):
    """PyPI's independent renderer, but for two things in which it differs from the recordings.

    It prints names of tools only, and encodes a result apart from the line before it, which gives
    other ids where the result begins with white space.
    """
    kimi = pytest.importorskip("renderers.kimi_k2")
    renderer = Renderer(tokenizer)

    class Theirs:
        unk_token_id = -1
        convert_tokens_to_ids = staticmethod(tokenizer.special_ids.__getitem__)

        def encode(self, text, add_special_tokens=False):
            return tokenizer.encode(text)

    peer = kimi.KimiK2Renderer(Theirs())
    for sample in samples(200):
        named = [
            replace(m, content=m.content.lstrip()) if m.role == "tool" else replace(m, name=None)
            for m in sample.messages
        ]
        messages, tools = objects(replace(sample, messages=tuple(named)))
        ours, theirs = renderer.render(named, sample.tools), peer.render(messages, tools=tools)
        assert ours.ids == theirs.token_ids
        trained = [m.role == "assistant" and m.is_trained for m in named]
        mask = [
            int(at >= 0 and trained[at] and sampled)
            for at, sampled in zip(theirs.message_indices, theirs.sampled_mask, strict=True)
        ]
        assert ours.loss_mask == mask


def test_a_longer_dialogue_begins_with_the_ids_of_a_shorter_one(toy):
    for sample in samples(30):
        renderer = Renderer(toy)
        growing = Dialogue(renderer, sample.tools)
        for number, message in enumerate(sample.messages, start=1):
            before = growing.ids
            growing.append(message)
            whole = renderer.render(sample.messages[:number], sample.tools)
            assert (list(growing.ids), list(growing.loss_mask)) == (whole.ids, whole.loss_mask)
            assert growing.ids[: len(before)] == before
            prompt = renderer.render(
                sample.messages[:number], sample.tools, add_generation_prompt=True
            )
            assert list(growing.prompt()) == prompt.ids


def test_sampled_ids_stay_as_they_are(toy):
    """``ab`` may be sampled as two tokens where encoding would give one."""
    renderer = Renderer(toy)
    dialogue = Dialogue(renderer)
    dialogue.append(Message("user", "say tide"))
    prompt = dialogue.prompt()
    sampled = [id for letter in "tide" for id in toy.encode(letter)]
    assert sampled != toy.encode("tide")
    end = renderer.control.by_name[IM_END]
    dialogue.append_sampled([*sampled, end, 7, 7])
    assert dialogue.ids == (*prompt, *sampled, end)
    assert dialogue.loss_mask == (0,) * len(prompt) + (1,) * (len(sampled) + 1)
    dialogue.append_sampled(sampled)
    assert dialogue.loss_mask[-len(sampled) - 1 :] == (*(1,) * len(sampled), 0)
    assert dialogue.ids[-1] == end


def test_thinking_is_text_only_because_it_rewrites_history():
    form = Format("thinking")
    asked = [
        Message("user", "2+2?"),
        Message(
            "assistant", "", reasoning="easy", tool_calls=(ToolCall("functions.now:0", "now"),)
        ),
    ]
    longer = [*asked, Message("assistant", "4"), Message("user", "3+3?")]
    assert "<think>easy</think>" in render_text(asked, (), form)
    assert "<think></think>" in render_text(longer, (), form)
    assert not render_text(longer, (), form).startswith(render_text(asked, (), form))
    with pytest.raises(UserError, match="text only"):
        Renderer(object(), form)


@pytest.mark.parametrize(
    "message",
    [
        Message("tool", "x", "tool_declare", tool_call_id="functions.a:0"),
        Message("tool", "x", "system", tool_call_id="functions.a:0"),
        Message("system", "x", "tool"),
        Message("system", "[]", "tool_declare"),
        Message("system", "## Return of functions.a:0\nx", "memory"),
        Message("tool", "x", tool_call_id="functions.a:0\nforged"),
        Message("assistant", tool_calls=(ToolCall("", "a"),)),
    ],
    ids=lambda message: f"{message.role}-{message.name}",
)
def test_a_turn_that_would_read_as_another_kind_is_refused(message):
    with pytest.raises(UserError):
        render_text([message], (), CANONICAL)


def test_a_tokenizer_without_the_control_tokens_is_refused(toy):
    class Bare:
        special_ids: dict[str, int] = {}  # noqa: RUF012
        encode = toy.encode

    with pytest.raises(UserError, match=r"no control token <\|im_end\|>"):
        Renderer(Bare())


def test_a_tokenizer_that_reads_control_tokens_in_text_is_refused(toy_directory, tmp_path):
    """As ``special: false`` in a tokenizer.json does."""
    from megatron_k2.data.tokenizer import load_tokenizer

    fields = json.loads((toy_directory / "tokenizer.json").read_text())
    for token in fields["added_tokens"]:
        token["special"] = token["content"] != "<|tool_call_begin|>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"letters <\|tool_call_begin\|>"):
        Renderer(load_tokenizer(tmp_path))
