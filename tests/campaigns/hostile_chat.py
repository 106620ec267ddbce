"""Hostile text in every place of a dialogue: no crash, no control token from it.

    python tests/campaigns/hostile_chat.py --seed 0 [--number 100000] [--tokenizer DIR]

Texts are made of names of control tokens, whole and in pieces, and of what else has confused
readers. Each goes into a place of its own choice: a user's, a tool's or a system message, a name, a
call's id or arguments, a tool's description. The ids must hold exactly the control tokens of the
same dialogue with harmless text, and parse back to it. The same text then stands as a model's
answer, by letters and by ids, before every degree of parser: a tolerant one reads anything, the
others raise ``FormatError`` alone. Last it stands as a line of a file: ``ValueError`` or a sample.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from megatron_k2.chat.call_ids import exact_name
from megatron_k2.chat.completion import Degree, FormatError, parse_completion
from megatron_k2.chat.control import ChatTokenizer
from megatron_k2.chat.lexer import IdLexer, TextLexer
from megatron_k2.chat.parse import parse_ids
from megatron_k2.chat.template import Renderer, pieces_of
from megatron_k2.data.hf_tokenizer import train_byte_bpe
from megatron_k2.data.tokenizer import load_tokenizer
from megatron_k2.errors import UserError
from megatron_k2.records.messages import Message, ToolCall, ToolSpec
from megatron_k2.records.read import read_json_line, sample_from
from tests.support.dialogues import WORDS, hostile

PLACES = ("user", "system", "assistant", "tool", "name", "id", "arguments", "description")
type Case = tuple[str, list[Message], list[ToolSpec]]


def case(rng: random.Random) -> Case:
    """Where the text went, and the dialogue that holds it."""
    text, place = hostile(rng), rng.choice(PLACES)

    def at(where: str, harmless: str) -> str:
        return text if where == place else harmless

    # An id stands on one line and in K2's form; every other place takes any text.
    name = (text.replace("\n", " ") or "look") if place == "id" else "look"
    call = ToolCall(f"functions.{name}:0", name, at("arguments", "{}"))
    function = {"name": "look", "description": at("description", "looks")}
    tool = ToolSpec(json.dumps({"type": "function", "function": function}))
    messages = [
        Message("system", at("system", "Be brief.")),
        Message("user", at("user", "Look."), at("name", "Ines")),
        Message("assistant", at("assistant", "Yes."), tool_calls=(call,)),
        Message("tool", at("tool", "seen"), tool_call_id=call.id),
        Message("assistant", "Seen."),
    ]
    return place, messages, [tool]


def rendered_wrongly(renderer: Renderer, messages: list[Message], tools: list[ToolSpec]) -> str:
    """What is wrong with a rendering, "" if nothing is."""
    try:
        rendered = renderer.render(messages, tools)
    except UserError as refusal:
        return f"refused: {refusal}"
    special = set(renderer.tokenizer.special_ids.values())
    found = [number for number in rendered.ids if number in special]
    written = [renderer.control.by_name[p.text] for p in pieces_of(messages, tools) if p.is_control]
    if found != written:
        return f"control ids {found}, the template writes {written}"
    if len(rendered.loss_mask) != len(rendered.ids):
        return "a mask of another length"
    try:
        back = parse_ids(rendered.ids, renderer.tokenizer)
    except FormatError as refusal:
        return f"does not parse back: {refusal}"
    same = (list(back.messages), list(back.tools)) == (messages, tools)
    return "" if same else "parses back to something else"


def parsed_wrongly(tokenizer: ChatTokenizer, text: str) -> str:
    """What is wrong with the parsers' way with a text, "" if nothing is."""
    readings: Iterator[tuple[Any, str | Sequence[int]]] = iter(
        [
            (TextLexer(allows_variants=True), text),
            (TextLexer(), text),
            (IdLexer(tokenizer), tokenizer.encode(text)),
        ]
    )
    for lexer, answer in readings:
        degrees: tuple[Degree, ...] = ("tolerant", "strict", "exact")
        for degree in degrees:
            try:
                found = parse_completion(lexer, answer, degree)
            except FormatError as refusal:
                if degree == "tolerant":
                    return f"the tolerant parser refused: {refusal}"
                lexer.close()
                continue
            if isinstance(lexer, IdLexer) and found.tool_calls:
                return "letters made a tool call"
            if degree != "tolerant" and not all(exact_name(c.id) for c in found.tool_calls):
                return "a strict parser took an id without a name"
    return ""


def line(rng: random.Random, messages: list[Message], tools: list[ToolSpec], text: str) -> str:
    """A sample's line with a value somewhere replaced."""
    found: Any = {
        "messages": [message.to_object() for message in messages],
        "tools": [tool.value for tool in tools],
    }
    place: Any = found
    while isinstance(place, dict | list) and place:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if rng.random() < 0.4 or not isinstance(place[key], dict | list) or not place[key]:
            place[key] = rng.choice(
                [text, None, 0, 1.5, True, [], {}, [text], {"role": text}, "\ud800"]
            )
            break
        place = place[key]
    written = json.dumps(found)
    return written if rng.random() < 0.9 else written[: rng.randrange(len(written))]


def read_wrongly(renderer: Renderer, written: str) -> str:
    """What is wrong with the reader's way with a line, "" if nothing is."""
    try:
        sample = sample_from(read_json_line(written))
    except ValueError:
        return ""
    if sample_from(read_json_line(sample.to_line())) != sample:
        return "a sample's line reads back as another"
    try:
        renderer.render(sample.messages, sample.tools)
    except UserError:
        return ""
    return ""


def campaign(tokenizer: ChatTokenizer, seed: int, number: int) -> tuple[Counter[str], list[str]]:
    """Cases of each place, and what went wrong."""
    renderer, counts, wrong = Renderer(tokenizer), Counter[str](), list[str]()
    for index in range(number):
        rng = random.Random(f"{seed} {index}")
        place, messages, tools = case(rng)
        counts[place] += 1
        text = hostile(rng)
        findings = {
            f"rendered in {place}": rendered_wrongly(renderer, messages, tools),
            "parsed": parsed_wrongly(tokenizer, text),
            "read": read_wrongly(renderer, line(rng, messages, tools, text)),
        }
        wrong += [f"{index}: {what}: {why}" for what, why in findings.items() if why]
    return counts, wrong


def toy_tokenizer(directory: Path) -> ChatTokenizer:
    """A byte-level BPE with K2's control tokens."""
    train_byte_bpe([" ".join(WORDS), "<|im_end|> tool_calls_section"], 400, directory)
    return load_tokenizer(directory)


def main(argv: list[str] | None = None) -> int:
    """Run it and print the table; 1 where anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--number", type=int, default=100_000)
    parser.add_argument("--tokenizer", type=Path, help="default: a BPE trained on the spot")
    arguments = parser.parse_args(argv)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        named = arguments.tokenizer
        tokenizer = load_tokenizer(named) if named else toy_tokenizer(Path(folder))
        counts, wrong = campaign(tokenizer, arguments.seed, arguments.number)
    print("  ".join(f"{place} {counts[place]:,}" for place in PLACES))
    print("\n".join(wrong[:20]))
    print(f"seed {arguments.seed}: {arguments.number:,} texts, {len(wrong)} not as they should be, "
          f"{time.monotonic() - start:.0f} s")  # fmt: skip
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
