"""Raw text ten times, one rephrasing ten times, ten rephrasings once: which is remembered?

The report's Table 1 at toy size (arXiv:2507.20534, section 2.2): `k2-tiny` is trained on a closed
set of facts three ways at equal tokens, then taught the form of questions on half of the people and
asked about the other half. Exposures are scaled equally in all arms (``--repeats``). Every
rephrasing passes the surface gate and the coverage check of `megatron-k2 rephrase` first.

    python examples/rephrasing/run.py

The optimizer is AdamW, in one process and in fp32. The teacher is scripted, so this shows what
variety of form does to recall, and nothing about a teacher's faults. A row is written as its arm
ends; killed, the same command goes on with the next.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import math
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from world import Person, article, people, question, rephrased

from megatron_k2.data.hf_tokenizer import TokenizerJson, train_byte_bpe
from megatron_k2.fidelity.surface import Surface
from megatron_k2.files import write_atomically
from megatron_k2.presets import get_preset
from megatron_k2.selfcheck.one_rank import build, one_rank
from megatron_k2.synthesis.rephrase.coverage import piece_problem

ARMS = {
    "raw text, 10 epochs": (0, 10),
    "1 rephrasing, 10 epochs": (1, 10),
    "10 rephrasings, 1 epoch": (10, 1),
}
"""Rephrasings of each article (0: itself) and epochs over them."""
COLOURS = ("#888888", "#2467a8", "#2a8a4a")
SEQUENCE = 256
IGNORED = -1
VOCABULARY = 1024
"""Of the tokenizer and the model: a smaller output layer; choice."""
OTHER_PEOPLE, OTHER_SEED = 400, 1_000_000
"""Of whom the tokenizer is made, so that the names of no seed's people are shorter; choice."""
TUNE_LR = 0.25
"""Of the learning rate, for the questions; choice."""


def checked(person: Person, number: int, seed: int) -> str:
    """A rephrasing that passes the gates, or the run ends."""
    source, text = article(person), rephrased(person, number, seed)
    if problem := Surface(source, text).gates() or piece_problem(source, text):
        raise SystemExit(f"the gate refuses {text!r}: {problem}")
    return text


def corpus(arm: str, world: Sequence[Person], repeats: int, seed: int) -> Iterator[list[str]]:
    """The arm's texts, epoch by epoch, each in an order of its own."""
    rephrasings, epochs = ARMS[arm]
    if rephrasings:
        texts = [checked(p, n, seed) for p in world for n in range(rephrasings)]
    else:
        texts = [article(p) for p in world]
    order = random.Random(f"{arm}/{seed}")
    for _ in range(epochs * repeats):
        order.shuffle(texts)
        yield texts


def stream(texts: Iterator[list[str]], tokenizer: TokenizerJson, most: int) -> torch.Tensor:
    """Ids of all texts with an end token each, cut at ``most``: equal in all arms."""
    known: dict[str, list[int]] = {}
    ids: list[int] = []
    for epoch in texts:
        for text in epoch:
            if text not in known:
                known[text] = [*tokenizer.encode(text), tokenizer.eod_id]
            ids += known[text]
        if len(ids) >= most:
            break
    return torch.tensor(ids[:most])


def losses(model: Any, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of each position [b, s], nats; ignored positions count as token 0 and are masked out."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens).contiguous()
    found = model(tokens, positions, None, labels=labels.clamp(min=0))
    return found * (labels != IGNORED)


def train(
    model: Any, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], steps: int, lr: float
) -> list[float]:
    """AdamW with a warm-up and a cosine; the loss of each step."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    seen = []
    for step in range(steps):
        warm = min(1.0, (step + 1) / max(steps // 20, 1))
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        tokens, labels = next(batches)
        loss = losses(model, tokens, labels).sum() / (labels != IGNORED).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen.append(float(loss.detach()))
    return seen


def text_batches(ids: torch.Tensor, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Consecutive windows."""
    window = SEQUENCE * batch
    for start in range(0, len(ids) - window, window):
        yield (
            ids[start : start + window].view(batch, SEQUENCE),
            ids[start + 1 : start + window + 1].view(batch, SEQUENCE),
        )


def asked(tokenizer: TokenizerJson, world: Sequence[Person]) -> list[tuple[list[int], list[int]]]:
    """Ids of every question and of its answer with an end token."""
    pairs = [question(person, key) for person in world for key in person.facts]
    return [
        (tokenizer.encode(ask), [*tokenizer.encode(answer), tokenizer.eod_id])
        for ask, answer in pairs
    ]


def padded(pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Questions with their answers, of which the answers are targets."""
    width = max(len(a) + len(b) for a, b in pairs) - 1
    tokens = torch.zeros(len(pairs), width, dtype=torch.long)
    labels = torch.full((len(pairs), width), IGNORED)
    for row, (ask, answer) in enumerate(pairs):
        both = [*ask, *answer]
        tokens[row, : len(both) - 1] = torch.tensor(both[:-1])
        labels[row, len(ask) - 1 : len(both) - 1] = torch.tensor(answer)
    return tokens, labels


def question_batches(
    pairs: Sequence[tuple[list[int], list[int]]], seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    order = random.Random(seed)
    while True:
        yield padded(order.sample(pairs, min(64, len(pairs))))


@torch.no_grad()
def recall(model: Any, pairs: Sequence[tuple[list[int], list[int]]]) -> float:
    """Share of questions whose answer greedy decoding gives, end token included."""
    right = 0
    for start in range(0, len(pairs), 64):
        tokens, labels = padded(pairs[start : start + 64])
        positions = torch.arange(tokens.shape[1]).expand_as(tokens).contiguous()
        best = model(tokens, positions, None).argmax(-1)
        right += int(((best == labels) | (labels == IGNORED)).all(1).sum())
    return right / len(pairs)


def measured(options: argparse.Namespace, arm: str, seed: int, tokenizer: Any) -> dict[str, Any]:
    """One arm and seed, from initial weights to recall."""
    began = time.monotonic()
    world = people(options.people, seed)
    rarest = sum(len(tokenizer.encode(article(p))) + 1 for p in world) * 10 * options.repeats
    ids = stream(corpus(arm, world, options.repeats, seed), tokenizer, rarest)
    steps = (len(ids) - 1) // (SEQUENCE * options.batch)
    torch.manual_seed(seed)
    shape = ["--seq-length", str(SEQUENCE), "--max-position-embeddings", str(SEQUENCE)]
    preset = dataclasses.replace(get_preset("k2-tiny"), vocab_size=VOCABULARY)
    with contextlib.redirect_stdout(io.StringIO()):  # Megatron prints every flag
        model = build(preset, *shape, "--seed", str(seed + 1))
    curve = train(model, text_batches(ids, options.batch), steps, options.lr)
    half = len(world) // 2
    tuned, held_out = asked(tokenizer, world[:half]), asked(tokenizer, world[half:])
    train(model, question_batches(tuned, seed), options.tune_steps, TUNE_LR * options.lr)
    return {
        "arm": arm,
        "seed": seed,
        "tokens": len(ids),
        "loss": sum(curve[-10:]) / 10,
        "recall": recall(model, held_out),
        "recall_of_tuned": recall(model, tuned),
        "seconds": time.monotonic() - began,
    }


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Recall by arm: a bar for the mean, a point a seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), dpi=130, facecolor="white")
    axes = figure.subplots()
    for place, (arm, colour) in enumerate(zip(ARMS, COLOURS, strict=True)):
        found = [100 * row["recall"] for row in rows if row["arm"] == arm]
        axes.bar(place, sum(found) / len(found), 0.6, color=colour)
        axes.plot([place] * len(found), found, "o", color="black", ms=4)
    axes.set_xticks(range(len(ARMS)), [arm.replace(", ", "\n") for arm in ARMS])
    axes.set_ylabel("questions on held-out people answered, %")
    axes.set_title(f"{rows[0]['tokens'] / 1e6:.1f} million tokens in every arm", fontsize=10)
    figure.tight_layout()
    FigureCanvasAgg(figure).print_png(str(path))


def made_tokenizer(folder: Path) -> TokenizerJson:
    """Of articles, rephrasings and questions about people whom nobody is asked about."""
    world = people(OTHER_PEOPLE, OTHER_SEED)
    texts = [text for p in world for text in (article(p), *(checked(p, n, 0) for n in (0, 1)))]
    texts += [" ".join(question(p, key)) for p in world for key in p.facts]
    train_byte_bpe(texts, VOCABULARY, folder)
    return TokenizerJson(folder)


def known_rows(path: Path, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """What an earlier run of the same inputs has measured."""
    if not path.is_file():
        return []
    record = json.loads(path.read_text())
    if record["inputs"] != inputs:
        raise SystemExit(f"{path} is of {record['inputs']}, not of {inputs}: choose another --out")
    return record["rows"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--people", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=70, help="of every arm, equally")
    parser.add_argument("--tune-steps", type=int, default=40, help="on questions, 64 each")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path("runs/rephrasing"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "rephrasing.json"
    inputs = {k: getattr(options, k) for k in ("people", "repeats", "tune_steps", "batch", "lr")}
    rows = known_rows(path, inputs)
    done = {(row["arm"], row["seed"]) for row in rows}
    with one_rank(), tempfile.TemporaryDirectory() as folder:
        tokenizer = made_tokenizer(Path(folder))
        for seed, arm in itertools.product(options.seeds, options.arms):
            if (arm, seed) not in done:
                rows.append(measured(options, arm, seed, tokenizer))
                print(json.dumps(rows[-1]), flush=True)
                record = {"inputs": inputs, "rows": rows}
                write_atomically(path, json.dumps(record, indent=1).encode())
    for arm in options.arms:
        found = [row["recall"] for row in rows if row["arm"] == arm]
        shown = ", ".join(f"{each:.1%}" for each in found)
        print(f"{arm}: {sum(found) / len(found):.1%} of held-out questions ({shown})")
    if {row["arm"] for row in rows} == set(ARMS):
        draw(rows, options.out / "rephrasing.png")


if __name__ == "__main__":
    main()
