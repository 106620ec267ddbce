"""Dialogues to packed sequences: template with tokenizer, packing, and two cores.

Three tables. Rendering on one core: dialogues to ids and loss mask by ``chat.template``, by PyPI's
``renderers`` and by ``transformers.apply_chat_template`` with our template's generation marks (K2's
own has none, and its mask is all zeros), each with the same vocabulary and the same dialogues in
the same rounds; every round has dialogues of its own, so nothing is remembered from the one
before. The ceiling is the tokenizer alone on the same texts, without template or mask. Packing: a
million lengths of a log-normal mix. Two cores: ``data chat`` as a whole with one worker and two.

    python benchmarks/sft_data.py --seed 0
    python benchmarks/sft_data.py --seed 0 --k2 DIR      # with tiktoken.model: K2's vocabulary

``renderers`` and its requirements are left out where they are not installed.
"""

import argparse
import os
import random
import resource
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # what one core does

import numpy as np
from harness import machine_lock, paired_medians, print_inputs, print_result

from megatron_k2.chat.jinja import jinja_template
from megatron_k2.chat.template import Renderer, pieces_of
from megatron_k2.data.hf_tokenizer import train_byte_bpe
from megatron_k2.data.tiktoken_tokenizer import PRE_TOKEN_PATTERN, TiktokenTokenizer
from megatron_k2.data.tokenizer import Tokenizer, load_tokenizer
from megatron_k2.records.messages import ChatSample, Message, ToolCall, ToolSpec
from megatron_k2.sft.packing import fill_of, pack
from megatron_k2.sft.prepare import prepare_chat
from megatron_k2.sft.prepare_plan import ChatOptions
from megatron_k2.terminal import show, table

MEDIAN_TOKENS, SIGMA = 600, 1.0
"""Of the log-normal mix of lengths."""
SEQUENCE_LENGTH = 4096


def source_texts() -> list[str]:
    """Paragraphs of the standard library's own source: real words, code and punctuation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text(encoding="utf-8") for path in sorted(root.glob("*.py"))[:120]]
    return [part for text in texts for part in text.split("\n\n") if 20 < len(part) < 2000]


def dialogues(texts: list[str], number: int, seed: object) -> list[ChatSample]:
    """One to four rounds each; a quarter with tools. System texts and tools are a set's few."""
    rng = random.Random(f"{seed}")
    pool = random.Random(0)
    systems = [pool.choice(texts) for _ in range(8)]
    tool_sets = [tuple(_tool(pool, texts) for _ in range(3)) for _ in range(8)]
    return [_dialogue(rng, texts, systems, tool_sets) for _ in range(number)]


def _tool(rng: random.Random, texts: list[str]) -> ToolSpec:
    import json

    fields = {f"field_{n}": {"type": "string", "description": rng.choice(texts)} for n in range(3)}
    parameters = {"type": "object", "properties": fields}
    name = f"tool_{rng.randrange(1000)}"
    function = {"name": name, "description": rng.choice(texts), "parameters": parameters}
    return ToolSpec(json.dumps({"type": "function", "function": function}))


def _dialogue(
    rng: random.Random,
    texts: list[str],
    systems: list[str],
    tool_sets: list[tuple[ToolSpec, ...]],
) -> ChatSample:
    tools = rng.choice(tool_sets) if rng.random() < 0.25 else ()
    messages, calls = [Message("system", rng.choice(systems))], 0
    for _ in range(rng.randint(1, 4)):
        messages.append(Message("user", f"{rng.random()} {rng.choice(texts)}"))
        if tools:
            arguments = f'{{"field_0": "{rng.random()}"}}'
            call = ToolCall(f"functions.{tools[0].name}:{calls}", tools[0].name, arguments)
            calls += 1
            messages.append(Message("assistant", tool_calls=(call,)))
            messages.append(Message("tool", rng.choice(texts), tool_call_id=call.id))
        answer = "\n\n".join(rng.choices(texts, k=rng.randint(1, 3)))
        messages.append(Message("assistant", answer))
    return ChatSample(tuple(messages), tools, id=str(rng.random()))


type Batch = list[ChatSample]
type Objects = list[tuple[list[dict[str, Any]], list[dict[str, Any]] | None]]


def objects(batch: Batch) -> Objects:
    """The same in OpenAI's form, which the others read."""
    return [
        ([m.to_object() for m in s.messages], [t.value for t in s.tools] or None) for s in batch
    ]


class SameTiktoken:
    """What ``renderers`` asks of a tokenizer, over K2's own: the least that can stand between."""

    unk_token_id = -1

    def __init__(self, tokenizer: TiktokenTokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return self._tokenizer.encode(text)

    def convert_tokens_to_ids(self, name: str) -> int:
        return self._tokenizer.special_ids[name]


def transformers_tokenizer(directory: Path, tokenizer: Tokenizer) -> Any:
    """The same vocabulary as one of transformers' fast tokenizers."""
    if not isinstance(tokenizer, TiktokenTokenizer):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(directory)
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    converter = TikTokenConverter(
        vocab_file=str(directory / "tiktoken.model"),
        pattern=PRE_TOKEN_PATTERN,
        extra_special_tokens=list(tokenizer.special_ids),
    )
    return PreTrainedTokenizerFast(tokenizer_object=converter.converted())


def candidates(
    tokenizer: Tokenizer, directory: Path, batches: list[Batch]
) -> dict[str, Callable[[], int]]:
    """Each renders its next batch at every call, and returns the number of tokens."""
    found: dict[str, Callable[[], int]] = {}

    def ours(batch: Batch) -> int:
        renderer = Renderer(tokenizer)
        return sum(len(renderer.render(s.messages, s.tools).ids) for s in batch)

    def tokenizer_alone(batch: list[list[str]]) -> int:
        return sum(len(tokenizer.encode(text)) for texts in batch for text in texts)

    def over(work: Callable[[Any], int], prepared: list[Any]) -> Callable[[], int]:
        upcoming: Iterator[Any] = iter(prepared)
        return lambda: work(next(upcoming))

    found["megatron_k2"] = over(ours, batches)
    texts = [[_texts(sample) for sample in batch] for batch in batches]
    found["tokenizer alone"] = over(tokenizer_alone, texts)
    theirs = [objects(batch) for batch in batches]
    fast = transformers_tokenizer(directory, tokenizer)
    if (peer := _renderers(tokenizer, fast)) is not None:
        found["renderers"] = over(
            lambda batch: sum(len(peer.render(m, tools=t).token_ids) for m, t in batch), theirs
        )
    found["transformers"] = over(lambda batch: _by_transformers(fast, batch), theirs)
    return found


def _texts(sample: ChatSample) -> list[str]:
    """What is the sample's own; what many share is encoded once by anyone who cares."""
    pieces = pieces_of(sample.messages, sample.tools)
    return [p.text for p in pieces if p.text and not p.is_control and not p.is_common]


def _renderers(tokenizer: Tokenizer, fast: Any) -> Any:
    try:
        from renderers.kimi_k2 import KimiK2Renderer
    except ImportError as missing:
        print(f"renderers is left out: {missing}")
        return None
    is_k2 = isinstance(tokenizer, TiktokenTokenizer)
    return KimiK2Renderer(SameTiktoken(tokenizer) if is_k2 else fast)


def _by_transformers(fast: Any, batch: Objects) -> int:
    template, num_tokens = jinja_template(has_generation_marks=True), 0
    for messages, tools in batch:
        found = fast.apply_chat_template(
            messages,
            tools=tools,
            chat_template=template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        num_tokens += len(found["input_ids"])
    return num_tokens


def check_equal(tokenizer: Tokenizer, directory: Path, batch: Batch) -> None:
    """Speeds of things that differ would say nothing."""
    fast, renderer = transformers_tokenizer(directory, tokenizer), Renderer(tokenizer)
    for sample, (messages, tools) in zip(batch, objects(batch), strict=True):
        ours = renderer.render(sample.messages, sample.tools)
        theirs = fast.apply_chat_template(
            messages,
            tools=tools,
            chat_template=jinja_template(has_generation_marks=True),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        if ours.ids != theirs["input_ids"] or ours.loss_mask != theirs["assistant_masks"]:
            sys.exit(f"{sample.id}: transformers gives other ids or another mask")


def bench_render(
    tokenizer: Tokenizer, directory: Path, texts: list[str], options: argparse.Namespace
) -> dict[str, float]:
    """Tokens a second of each, and ours over theirs."""
    batches = [
        dialogues(texts, options.dialogues, f"{options.seed} {number}")
        for number in range(options.rounds + 1)
    ]
    check_equal(tokenizer, directory, batches[0][:20])
    num_tokens = sum(len(Renderer(tokenizer).render(s.messages, s.tools).ids) for s in batches[-1])
    timings = paired_medians(
        candidates(tokenizer, directory, batches), options.rounds, options.seed
    )
    base = timings["megatron_k2"].cpu_seconds
    shown = table("", "CPU s", "M tokens/s", "time / ours", title=f"rendering, {tokenizer.kind}")
    for name, timing in timings.items():
        seconds = timing.cpu_seconds
        shown.add_row(
            name, f"{seconds:.3f}", f"{num_tokens / seconds / 1e6:.2f}", f"{seconds / base:.2f}"
        )
    show(shown)
    peers = {
        n: timings[n].cpu_seconds / base for n in ("renderers", "transformers") if n in timings
    }
    ceiling = timings["tokenizer alone"].cpu_seconds / base
    figures = {f"{name}_over_ours": ratio for name, ratio in peers.items()}
    return figures | {"share_of_ceiling": ceiling}


def bench_packing(options: argparse.Namespace) -> dict[str, float]:
    """Seconds and fill of a log-normal mix."""
    rng = np.random.default_rng(options.seed)
    lengths = rng.lognormal(np.log(MEDIAN_TOKENS), SIGMA, options.samples).astype(np.int64)
    lengths = np.clip(lengths, 2, SEQUENCE_LENGTH + 1)
    shown = table("", "seconds", "sequences", "fill", title=f"packing {options.samples:,} samples")
    figures = {}
    for method in ("best-fit", "first-fit"):
        start = time.perf_counter()
        packs = pack(lengths, SEQUENCE_LENGTH, method=method)
        seconds, fill = time.perf_counter() - start, fill_of(packs, lengths, SEQUENCE_LENGTH)
        shown.add_row(method, f"{seconds:.2f}", f"{len(packs):,}", f"{fill:.3%}")
        if method == "best-fit":
            figures = {"pack_seconds": seconds, "pack_fill": fill}
    show(shown)
    return figures


def bench_cores(
    tokenizer: Path, texts: list[str], folder: Path, options: argparse.Namespace
) -> dict[str, float]:
    """``data chat`` with one worker and two, in turns.

    Beside wall seconds, which need a quiet machine, the longest chain of CPU seconds: the parent's
    own, and half of what two workers took together, their start included.
    """
    number = options.dialogues * 100
    lines = [sample.to_line() for sample in dialogues(texts, number, f"{options.seed} cores")]
    (folder / "in.jsonl").write_text("".join(lines))
    seconds: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    for turn in range(min(options.rounds, 3)):
        for workers in (1, 2) if turn % 2 else (2, 1):
            output = folder / f"{turn}-{workers}"
            chosen = ChatOptions(
                output,
                (folder / "in.jsonl",),
                tokenizer,
                SEQUENCE_LENGTH,
                validation_fraction=0.0,
                num_workers=workers,
            )
            wall, own, others = time.perf_counter(), time.process_time(), _children_seconds()
            prepare_chat(chosen)
            own, others = time.process_time() - own, _children_seconds() - others
            seconds[workers].append((time.perf_counter() - wall, own + others / workers))
    size = (folder / "in.jsonl").stat().st_size / 1e6
    shown = table(
        *("workers", "wall s", "MB/s", "chain of CPU s"),
        title=f"data chat, {number:,} dialogues, {size:.0f} MB",
    )
    walls = {workers: min(wall for wall, _ in found) for workers, found in seconds.items()}
    chains = {workers: min(chain for _, chain in found) for workers, found in seconds.items()}
    for workers in (1, 2):
        speed = size / walls[workers]
        shown.add_row(
            str(workers), f"{walls[workers]:.2f}", f"{speed:.1f}", f"{chains[workers]:.2f}"
        )
    show(shown)
    return {"scaling_2_cores": walls[1] / walls[2], "scaling_2_cores_cpu": chains[1] / chains[2]}


def _children_seconds() -> float:
    """CPU seconds of workers that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dialogues", type=int, default=300, help="of a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--samples", type=int, default=1_000_000, help="to pack")
    parser.add_argument("--k2", type=Path, metavar="DIR", help="with K2's tiktoken.model")
    options = parser.parse_args()
    texts = source_texts()
    with machine_lock(), tempfile.TemporaryDirectory() as name:
        print_inputs(**vars(options), texts=len(texts), vocabulary=4096)
        folder = Path(name)
        train_byte_bpe(texts, 4096, folder / "bpe")
        figures = bench_render(load_tokenizer(folder / "bpe"), folder / "bpe", texts, options)
        if options.k2:
            k2 = bench_render(load_tokenizer(options.k2), options.k2, texts, options)
            figures |= {f"k2_{each}": value for each, value in k2.items()}
        figures |= bench_packing(options)
        figures |= bench_cores(folder / "bpe", texts, folder, options)
        print_result(**figures)


if __name__ == "__main__":
    main()
