"""A dialogue with a model of ours: turns in, streamed answers out, tool calls left to the person.

In-process, as ``generate`` is. A turn the model sampled stays in the dialogue by its own ids, so a
cache goes on where it stopped. Nothing a model says is executed: its calls are shown, and whoever
sits there answers them.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_k2.chat.completion import Completion, CompletionParser, CompletionStream, Event
from megatron_k2.chat.control import IM_END
from megatron_k2.chat.dialogue import Dialogue
from megatron_k2.chat.lexer import IdLexer
from megatron_k2.chat.template import Renderer
from megatron_k2.data.tokenizer import Tokenizer, load_tokenizer
from megatron_k2.engine.mcore.jobs import check_length, round_up, sampling_params
from megatron_k2.engine.mcore.options import check_chat, layout_of
from megatron_k2.engine.mcore.saved_args import check_model, plain_saved_args, tokenizer_path
from megatron_k2.engine.protocol import SamplingParams
from megatron_k2.errors import UserError
from megatron_k2.parallel.layout import Layout
from megatron_k2.records.messages import Message, ToolSpec
from megatron_k2.records.read import message_from, tool_from

Ask = Callable[[str], str | None]
"""Shows a prompt and reads a line; ``None`` at the end."""


Continue = Callable[[Sequence[int], SamplingParams], Iterator[int]]
"""A prompt's new tokens, one by one: of whatever holds the model."""


@dataclass(frozen=True)
class ChatJob:
    """The checked inputs of ``chat``: a checkpoint, its layout here, and a dialogue's beginning."""

    directory: Path
    saved: Namespace
    layout: Layout
    tokenizer: Tokenizer
    tools: tuple[ToolSpec, ...]
    messages: tuple[Message, ...]


def chat_job(args: Namespace, world_size: int) -> ChatJob:
    """Settle ``chat``'s options against checkpoint, tokenizer and ranks.

    Raises:
        UserError: for every wrong input.
    """
    check_chat(args)
    layout = layout_of(args, world_size)
    directory, saved = plain_saved_args(args.load, args.iteration)
    tokenizer = load_tokenizer(tokenizer_path(saved, args.tokenizer, args.data))
    tools = tuple(_records(args.tools, tool_from)) if args.tools else ()
    messages = list(_records(args.messages, message_from)) if args.messages else []
    if args.system is not None:
        messages.insert(0, Message("system", args.system))
    if args.prompt is not None:
        messages.append(Message("user", args.prompt))
    job = ChatJob(directory, saved, layout, tokenizer, tools, tuple(messages))
    prompt = opened(job).prompt()
    check_length(len(prompt), args.max_new_tokens, saved.max_position_embeddings)
    check_model(
        saved,
        layout,
        seq_length=round_up(len(prompt), layout),
        data_vocab=tokenizer.vocab_size,
        data="the tokenizer",
    )
    return job


def opened(job: ChatJob) -> Dialogue:
    """The dialogue as the options begin it."""
    dialogue = Dialogue(Renderer(job.tokenizer), job.tools)
    for message in job.messages:
        dialogue.append(message)
    return dialogue


def _records[R](path: Path, record_from: Callable[[dict], R]) -> Iterator[R]:
    """Records of a JSON file that holds a list of objects."""
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, list):
            raise ValueError(f"a list is expected, found {type(found).__name__}")
        yield from map(record_from, found)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}") from None


@dataclass
class Talk:
    """One dialogue with a model, on every rank alike.

    Args:
        continued: the model.
        job: see ``chat_job``.
        args: of the command line: temperature, top-p, length, seed.
        show: takes each event of an answer as it comes.
    """

    continued: Continue
    job: ChatJob
    args: Namespace
    show: Callable[[Event], None]
    num_answers: int = 0
    dialogue: Dialogue = field(init=False)

    def __post_init__(self) -> None:
        self.dialogue = opened(self.job)

    def answer(self) -> Completion:
        """The model's next turn, sampled, shown as it comes, and kept.

        Raises:
            UserError: where it would leave the model's positions.
        """
        tokenizer, args = self.job.tokenizer, self.args
        prompt = self.dialogue.prompt()
        check_length(len(prompt), args.max_new_tokens, self.job.saved.max_position_embeddings)
        params = sampling_params(args, tokenizer.special_ids[IM_END], self.num_answers)
        stream = CompletionStream(IdLexer(tokenizer), CompletionParser("tolerant", self.job.tools))
        sampled = []
        for token in self.continued(prompt, params):
            sampled.append(token)
            for event in stream.feed([token]):
                self.show(event)
        events, completion = stream.close()
        for event in events:
            self.show(event)
        self.dialogue.append_sampled(sampled)
        self.num_answers += 1
        return completion

    def converse(self, ask: Ask) -> None:
        """Turn by turn until ``ask`` ends; calls are answered by whoever is asked."""
        while (text := ask("> ")) is not None:
            self.dialogue.append(Message("user", text))
            completion = self.answer()
            while completion.tool_calls:
                for call in completion.tool_calls:
                    result = ask(f"result of {call.id}> ")
                    if result is None:
                        return
                    self.dialogue.append(Message("tool", result, tool_call_id=call.id))
                completion = self.answer()


def shown(event: Event) -> str:
    """An event of an answer as text for a terminal."""
    match event.kind:
        case "content" | "arguments":
            return event.text
        case "call":
            return f"\n[{event.text}] "
        case _:
            return "\n"


def read_line(prompt: str) -> str | None:
    """A line of standard input, where a terminal asks for it with ``prompt``."""
    if sys.stdin.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None
