"""What the model calls for questions it was not trained on: ``evaluate.py RUN TOKENIZER SET OUT``.

Greedy answers to ``held_out.jsonl`` and ``other_module.jsonl`` of SET. An answer is format-exact
where the strict parser takes it: K2's tokens in their order, an id of the right form, arguments
that are a JSON object, the turn closed. It is exact where it also is the one call that was wanted.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megatron_k2.chat.completion import FormatError, parse_completion
from megatron_k2.chat.control import IM_END
from megatron_k2.chat.lexer import IdLexer
from megatron_k2.chat.template import Renderer
from megatron_k2.data.tokenizer import Tokenizer, load_tokenizer
from megatron_k2.engine.local.offline import answers
from megatron_k2.engine.local.opened import core_of
from megatron_k2.engine.protocol import SamplingParams
from megatron_k2.quiet import quieten
from megatron_k2.records.read import message_from, tool_from

MAX_NEW_TOKENS, NUM_SLOTS = 64, 16
PARTS = ("held_out", "other_module")


def prompt_of(test: dict[str, Any], renderer: Renderer) -> list[int]:
    """Ids up to where the model answers."""
    messages = [message_from(message) for message in test["messages"]]
    tools = [tool_from(tool) for tool in test["tools"]]
    return renderer.render(messages, tools, add_generation_prompt=True).ids


def judged(answer: list[int], expected: dict[str, str], tokenizer: Tokenizer) -> dict[str, Any]:
    """Whether an answer is in the format, and whether it is the call that was wanted."""
    text = tokenizer.decode(answer)
    try:
        completion = parse_completion(IdLexer(tokenizer), answer, "strict")
    except FormatError as problem:
        return {"text": text, "format": False, "exact": False, "problem": str(problem)}
    calls = [(call.name, json.loads(call.arguments)) for call in completion.tool_calls]
    wanted = [(expected["name"], json.loads(expected["arguments"]))]
    return {"text": text, "format": bool(calls), "exact": calls == wanted}


def share(rows: list[dict[str, Any]], key: str) -> float:
    """Of the rows for which ``key`` holds."""
    return sum(row[key] for row in rows) / len(rows)


def main(arguments: argparse.Namespace) -> int:
    """Answer, judge, write ``OUT``, print a sample of each part."""
    quieten()
    tokenizer = load_tokenizer(arguments.tokenizer)
    renderer = Renderer(tokenizer)
    greedy = SamplingParams(
        MAX_NEW_TOKENS, temperature=0, stop_token_ids=(tokenizer.special_ids[IM_END],)
    )
    parts, result = {}, {}
    for part in PARTS:
        lines = (arguments.set / f"{part}.jsonl").read_text().splitlines()
        tests = [json.loads(line) for line in lines]
        parts[part] = tests, [prompt_of(test, renderer) for test in tests]
    longest = max(len(prompt) for _, prompts in parts.values() for prompt in prompts)
    core = core_of(arguments.run, num_slots=NUM_SLOTS, max_length=longest + MAX_NEW_TOKENS)
    for part, (tests, prompts) in parts.items():
        rows = [
            {"question": test["messages"][0]["content"]}
            | judged(answer, test["expected"], tokenizer)
            for test, answer in zip(tests, answers(core, prompts, greedy), strict=True)
        ]
        result[part] = {
            "format": share(rows, "format"),
            "exact": share(rows, "exact"),
            "answers": rows,
        }
        print(f"{part}: format {share(rows, 'format'):.0%}, exact {share(rows, 'exact'):.0%}")
        for row in rows[:2]:
            print(f"  {row['question']}\n    {row['text']}")
    arguments.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("run", "tokenizer", "set", "out"):
        parser.add_argument(name, type=Path)
    sys.exit(main(parser.parse_args()))
