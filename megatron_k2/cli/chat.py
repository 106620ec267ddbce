"""``megatron-k2 chat``: talk to a checkpoint; ``render``, ``parse`` convert files of dialogues."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_k2.chat.completion import Completion, Degree
    from megatron_k2.chat.parse import ParsedDialogue
    from megatron_k2.data.tokenizer import Tokenizer
    from megatron_k2.records.messages import ToolSpec

    type Tools = tuple[ToolSpec, ...]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-k2 chat")
    verbs = parser.add_subparsers(dest="verb", required=True)
    render = verbs.add_parser(
        "render",
        help="dialogues to token ids, loss mask and text",
        description="One dialogue a line in, as {messages, tools}; one object a line out.",
    )
    parse = verbs.add_parser(
        "parse",
        help="ids or text to messages and tool calls",
        description="One {ids} or {text} a line in: a whole dialogue where it begins with a turn's "
        "token, else what a model answered; {tools} help to name a call that only counts. Calls "
        "and what was wrong with them come out.",
    )
    for verb in (render, parse):
        verb.add_argument("--jsonl", type=Path, required=True, metavar="FILE")
        verb.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
        verb.add_argument(
            "--tokenizer",
            type=Path,
            metavar="PATH",
            help="with K2's control tokens; without one, text alone",
        )
    render.add_argument("--template", default="0905", help="0905, 0905-first, 0711 or thinking")
    render.add_argument("--declarations", default="json", help="json or typescript")
    render.add_argument("--generation-prompt", action="store_true", help="end in the next header")
    parse.add_argument(
        "--strict", action="store_true", help="an error where the format is not exact"
    )
    return parser


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    from megatron_k2.errors import UserError
    from megatron_k2.records.read import read_json_line

    if not path.is_file():
        raise UserError(f"{path} is not a file; expected one JSON object a line")
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.isspace():
                continue
            try:
                yield number, read_json_line(line)
            except ValueError as problem:
                raise UserError(f"{path}:{number}: {problem}") from None


def _rendered(arguments: argparse.Namespace, tokenizer: "Tokenizer | None") -> Iterator[Any]:
    from megatron_k2.chat.template import Format, Renderer, render_text
    from megatron_k2.errors import UserError
    from megatron_k2.records.read import sample_from

    form = Format(arguments.template, arguments.declarations)
    prompt = arguments.generation_prompt
    renderer = Renderer(tokenizer, form) if tokenizer is not None else None
    for number, found in _lines(arguments.jsonl):
        try:
            sample = sample_from(found)
            text = render_text(sample.messages, sample.tools, form, add_generation_prompt=prompt)
        except ValueError as problem:
            raise UserError(f"{arguments.jsonl}:{number}: {problem}") from None
        row: dict[str, Any] = {"id": sample.id, "text": text}
        if renderer is not None:
            tokens = renderer.render(sample.messages, sample.tools, add_generation_prompt=prompt)
            row |= {"ids": tokens.ids, "loss_mask": tokens.loss_mask}
        yield row


def _parsed(arguments: argparse.Namespace, tokenizer: "Tokenizer | None") -> Iterator[Any]:
    from megatron_k2.chat.completion import FormatError
    from megatron_k2.errors import UserError
    from megatron_k2.records.read import tools_from

    degree: Degree = "strict" if arguments.strict else "tolerant"
    for number, found in _lines(arguments.jsonl):
        where, ids, text = f"{arguments.jsonl}:{number}", found.get("ids"), found.get("text")
        try:
            tools = tools_from(found.get("tools"))
            if isinstance(ids, list) and all(type(each) is int for each in ids):
                row = _read_ids(ids, tokenizer, degree, tools)
            elif ids is None and isinstance(text, str):
                row = _read_text(text, degree, tools)
            else:
                raise UserError("expected 'ids', a list of integers, or 'text', a string")
        except FormatError as problem:
            row = {"error": str(problem)}
        except ValueError as problem:
            raise UserError(f"{where}: {problem}") from None
        yield {"line": number, **row}


def _read_ids(
    ids: list[int], tokenizer: "Tokenizer | None", degree: "Degree", tools: "Tools"
) -> dict[str, Any]:
    from megatron_k2.chat.completion import parse_completion
    from megatron_k2.chat.control import OPENERS, control_ids
    from megatron_k2.chat.lexer import IdLexer
    from megatron_k2.chat.parse import parse_ids
    from megatron_k2.errors import UserError

    if tokenizer is None:
        raise UserError("'ids' mean nothing without their --tokenizer")
    if outside := [each for each in ids if not 0 <= each < tokenizer.vocab_size]:
        raise UserError(f"id {outside[0]} is not in the tokenizer's vocabulary")
    openers = [control_ids(tokenizer).by_name[name] for name in OPENERS]
    if ids[:1] and ids[0] in openers:
        return _dialogue(parse_ids(ids, tokenizer))
    return _completion(parse_completion(IdLexer(tokenizer), ids, degree, tools))


def _read_text(text: str, degree: "Degree", tools: "Tools") -> dict[str, Any]:
    from megatron_k2.chat.completion import parse_completion
    from megatron_k2.chat.control import OPENERS
    from megatron_k2.chat.lexer import TextLexer
    from megatron_k2.chat.parse import parse_text

    if text.startswith(OPENERS):
        return _dialogue(parse_text(text))
    lexer = TextLexer(allows_variants=degree == "tolerant")
    return _completion(parse_completion(lexer, text, degree, tools))


def _dialogue(found: "ParsedDialogue") -> dict[str, Any]:
    return {
        "messages": [message.to_object() for message in found.messages],
        "tools": [tool.value for tool in found.tools],
        "has_generation_prompt": found.has_generation_prompt,
    }


def _completion(found: "Completion") -> dict[str, Any]:
    return {
        "content": found.content,
        "tool_calls": [call.to_object() for call in found.tool_calls],
        "is_finished": found.is_finished,
        "findings": [finding._asdict() for finding in found.findings],
    }


def _write(rows: Iterable[Any], output: Path | None) -> None:
    """Each row a line; a file appears whole or not at all."""
    from megatron_k2.files import commit_file

    partial = output.with_name(f".{output.name}.partial") if output else None
    with ExitStack() as stack:
        stream = stack.enter_context(partial.open("w")) if partial else sys.stdout
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    if partial and output:
        commit_file(partial, output)


def _talk(argv: list[str]) -> int:
    from megatron_k2.engine.mcore.options import chat_parser, check_chat, without_nproc
    from megatron_k2.host.torchrun import launch

    args = chat_parser().parse_args(argv)
    check_chat(args)
    if args.nproc > 1:  # a rank's error would come wrapped in torchrun's report
        from megatron_k2.engine.mcore.chat import chat_job

        chat_job(args, args.nproc)
    return launch("megatron_k2.engine.mcore.ranks", ["chat", *without_nproc(argv)], args.nproc)


def main(argv: list[str]) -> int:
    """Run one of the two, or start the ranks of a dialogue; see ``megatron-k2 chat --help``."""
    if argv[:1] not in (["render"], ["parse"]):
        return _talk(argv)
    from megatron_k2.data.tokenizer import load_tokenizer

    arguments = _parser().parse_args(argv)
    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else None
    verbs = {"render": _rendered, "parse": _parsed}
    _write(verbs[arguments.verb](arguments, tokenizer), arguments.output)
    return 0
