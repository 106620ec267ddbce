"""Whole runs of reinforcement learning, killed at random moments and started again.

    python tests/campaigns/rl_sigkill.py --seed 0            # 20 kills, ten minutes
    python tests/campaigns/rl_sigkill.py --seed 0 --kills 2

``megatron-k2 rl`` on one rank with the embedded engine in batch-invariant mode: sampling, steps of
MuonClip, weights to the engine, a checkpoint every other iteration. It runs once undisturbed. Then
all its processes get SIGKILL at a moment drawn uniformly from the undisturbed duration, and the
same command is started again, to be killed again or to end. Each run must have trained on what the
undisturbed run trained on, answer by answer and reward by reward, have shown the same figures and
left the same bits in its last checkpoint, the optimizer's included. A run that ends before its kill
is compared, and the rest of the kills go to the next one. Not exercised: a kill of the machine.
"""

import argparse
import json
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

sys.path.insert(0, str(Path(__file__).parents[2]))

from megatron_k2.rl.history import read_history
from megatron_k2.rl.journal_reader import JOURNAL
from megatron_k2.rl.side import FOLDER, LEDGER
from megatron_k2.run.iterations import find_iteration
from tests.campaigns.sigkill import BY_ITSELF, K2, kill_after, run

KILLS_A_RUN = 5
"""At most: so that some runs are killed while they resume, and each ends."""
ITERATIONS = 8
DROPPED = "rl/dropped_tokens"
"""Drawn beyond the cut and thrown away: fewer where a killed process had ended some answers, which
are not drawn again."""
COMMAND = shlex.split("""
    rl --preset k2-tiny --hidden-size 64 --ffn-hidden-size 96 --num-layers 3
    --moe-layer-freq ([0]*1+[1]*2) --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 32
    --moe-shared-expert-intermediate-size 32 --qk-clip-threshold 0.1
    --seq-length 128 --max-position-embeddings 128 --synthetic-data --tasks data/letters.json
    --chat-tokenizer data/tokenizer --save out --save-interval 2 --batch-invariant
    --prompts-per-iteration 4 --group-size 4 --groups-in-play 6 --engine-slots 6
    --max-decode-steps 80 --eval-every 4 --rail truncated=off --lr 2e-3 --min-lr 2e-3
    --lr-warmup-iters 0 --seed 7
""")
"""Six slots end two and a half waves of answers an iteration: some are cut off half-way."""


def consumed(out: Path) -> list[list[Any]]:
    """By iteration what was trained on: ordinal, task, a hash of each answer, rewards."""
    found = []
    for line in (out / FOLDER / LEDGER / JOURNAL).read_text("utf-8").splitlines():
        record = json.loads(line.partition(" ")[2])
        if record["kind"] == "iteration":
            groups = record["groups"]
            found.append(
                [[g["prompt"], [ref[-1] for ref in g["answers"]], g["scores"]] for g in groups]
            )
    return found


def figures(out: Path) -> list[dict[str, float]]:
    """By iteration what was shown but for what it cost, which a kill changes."""
    rows = read_history(out / FOLDER)
    return [
        {k: v for k, v in row.metrics.items() if "seconds" not in k and k != DROPPED}
        for row in rows
    ]


def tensors(out: Path) -> dict[str, torch.Tensor]:
    """Of the last checkpoint."""
    reader = FileSystemReader(find_iteration(out, None))
    known = reader.read_metadata().state_dict_metadata.items()
    state = {
        name: torch.empty(each.size, dtype=each.properties.dtype)
        for name, each in known
        if isinstance(each, TensorStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    return state


def differ(found: Path, expected: Path) -> str:
    """The first difference between two runs, "" if there is none."""
    ours, theirs = consumed(found), consumed(expected)
    if ours != theirs:
        same = [a == b for a, b in zip(ours, theirs, strict=False)]
        return f"trained on other answers in iteration {(*same, False).index(False)}"
    for number, (a, b) in enumerate(zip(figures(found), figures(expected), strict=True)):
        if unequal := sorted(name for name in a | b if a.get(name) != b.get(name)):
            name = unequal[0]
            return f"iteration {number}: {name} is {a.get(name)}, expected {b.get(name)}"
    held, wanted = tensors(found), tensors(expected)
    if set(held) != set(wanted):
        return f"other tensors: {sorted(set(held) ^ set(wanted))[:3]}"
    unequal = [name for name in held if not torch.equal(held[name], wanted[name])]
    return f"{len(unequal)} of {len(held)} tensors differ, {unequal[0]} first" if unequal else ""


def phase(place: Path) -> str:
    """What a killed run was doing, from what lies in its directory."""
    path = place / "out" / FOLDER / LEDGER / JOURNAL
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    if not lines:
        return "before the first record"
    kind = json.loads(lines[-1].partition(" ")[2])["kind"] if lines[-1].endswith("}") else "torn"
    return {
        "iteration": "learns, saves, starts again",
        "evaluation": "evaluates",
        "torn": "a torn record",
    }.get(kind, "samples")


def killed_run(
    command: list[str], place: Path, kills: int, moments: Iterator[float], phases: Counter[str]
) -> None:
    """A run to its end, killed at most ``kills`` times on the way; ``phases`` counts what it did.

    Raises:
        RuntimeError: it could not be ended.
    """
    for _ in range(kills):
        try:
            if not kill_after(command, place, next(moments)):
                return
        except RuntimeError:
            phases[BY_ITSELF] += 1
            raise
        phases[phase(place)] += 1
    run(command, place)


def campaign(kills: int, seed: int, root: Path, iterations: int = ITERATIONS) -> list[str]:
    """Runs until there were so many kills; what was lost, a line each, after the histogram."""
    command, rng = [*K2, *COMMAND, "--iterations", str(iterations)], random.Random(seed)
    whole = root / "whole"
    whole.mkdir()
    start = time.monotonic()
    run(command, whole)
    duration = time.monotonic() - start
    moments = iter(lambda: rng.uniform(0, duration), None)
    is_cut = sum(row["rl/cut_off"] > 0 for row in figures(whole / "out"))
    print(f"undisturbed {duration:.1f} s, {is_cut} iterations with answers cut off", flush=True)
    phases: Counter[str] = Counter()
    lost, number = [], 0
    while (left := kills - sum(phases.values())) > 0:
        place, number = root / f"run{number}", number + 1
        # the tokenizer is trained on this package's own text, which may be edited meanwhile
        shutil.copytree(whole / "data", place / "data")
        try:
            killed_run(command, place, min(left, KILLS_A_RUN), moments, phases)
            fault = differ(place / "out", whole / "out")
        except RuntimeError as error:
            fault = str(error)
        if fault:
            lost.append(f"run {number - 1}: {fault}")
    print(f"{sum(phases.values())} kills of {number} runs")
    for name, count in phases.items():
        print(f"  {name:<32} {count:>4} {'#' * count}", flush=True)
    return lost


def main(argv: list[str] | None = None) -> int:
    """Run the campaign; exit code 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--keep", action="store_true", help="what the runs left")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="rl_sigkill.", delete=not options.keep) as name:
        lost = campaign(options.kills, options.seed, Path(name))
    if options.keep:
        print(name)
    print("\n".join([f"{len(lost)} lost", *lost]))
    return min(len(lost), 1)


if __name__ == "__main__":
    sys.exit(main())
