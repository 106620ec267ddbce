"""Commands killed at random moments and started again, until they finish: is anything lost?

    python tests/campaigns/sigkill.py --seed 0            # 20 kills a command, a quarter of an hour
    python tests/campaigns/sigkill.py --seed 0 --kills 2 --only convert-import data-prepare

Each command runs once undisturbed. Then, for every kill, it starts in a new directory, all its
processes get SIGKILL at a moment drawn uniformly from the undisturbed duration, and the same
command runs again to its end. What it leaves must equal what the undisturbed run left: every file's
bytes for data and conversions, every figure of ``metrics.jsonl`` but the seconds for training. A
kill after the end is drawn again. Not exercised: a kill of the machine, and of the second run.
"""

import argparse
import contextlib
import filecmp
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

from megatron_k2.run.iterations import is_whole, iteration_directories
from megatron_k2.run.metrics import METRICS_FILE, read_records
from tests.support import dialogues
from tests.support.paths import REPOSITORY

K2 = [sys.executable, "-W", "ignore", "-m", "megatron_k2"]
TRAINING = """
    pretrain --preset k2-tiny --mock-data --hidden-size 64 --ffn-hidden-size 96 --num-layers 3
    --moe-layer-freq ([0]*1+[1]*2) --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 32
    --moe-shared-expert-intermediate-size 32 --vocab-size 128 --seq-length 64
    --max-position-embeddings 64 --micro-batch-size 1 --global-batch-size 4 --train-samples 160
    --lr 2e-3 --lr-warmup-samples 4 --lr-decay-samples 160 --lr-wsd-decay-samples 8
    --qk-clip-threshold 0.1 --eval-iters 0 --save-interval 5 --nproc 2 --save out
"""
LAUNCH = """
    launch kimi_k2_pretrain_cpu --executor local --save out --set phase.tokens=20480
    --set phase.decay_tokens=4096 --set checkpoint.interval=2 --set checkpoint.retain_interval=2
"""
CORPUS = f"--input {REPOSITORY / 'megatron_k2'} {REPOSITORY / 'tests'} --suffix .py --workers 2"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Subject:
    """A command that is killed; it runs in a directory of its own and writes ``out`` there."""

    words: list[str]
    phase: Callable[[Path], str]
    """What it was doing, from what lies in its directory."""
    same: Callable[[Path, Path], str]
    """The first difference between two ``out`` directories, "" if there is none."""


def training_phase(place: Path) -> str:
    """By metrics and checkpoints."""
    out = place / "out"
    if not (out / METRICS_FILE).exists() or not read_records(out / METRICS_FILE):
        return "before the first step"
    is_torn = any(not is_whole(path) for path in iteration_directories(out).values())
    return "while a checkpoint is written" if is_torn else "between checkpoints"


def files_phase(place: Path, last: str = "out") -> str:
    """By what is made at the very end: a conversion's directory gets its name."""
    if (place / last).exists():
        return "after everything is written"
    return "while it writes" if any(place.glob("out*")) else "before it writes"


def data_phase(place: Path) -> str:
    """By the manifest, which is written last."""
    return files_phase(place, "out/dataset.json")


def chat_phase(place: Path) -> str:
    """The same for dialogues."""
    return files_phase(place, "out/chat.json")


def metrics_differ(found: Path, expected: Path) -> str:
    """The first step of which another figure than its seconds differs."""
    sides = []
    for out in (found, expected):
        rows = [vars(record).copy() for record in read_records(out / METRICS_FILE)]
        for row in rows:
            row["seconds"] = row["tokens_per_second"] = None
        sides.append(rows)
    if len(sides[0]) != len(sides[1]):
        return f"{len(sides[0])} steps recorded, expected {len(sides[1])}"
    unequal = [a["iteration"] for a, b in zip(*sides, strict=True) if a != b]
    return f"step {unequal[0]} differs" if unequal else ""


def files_differ(found: Path, expected: Path) -> str:
    """The first file that is not in both, or has other bytes."""
    names = [sorted(str(p.relative_to(d)) for p in d.rglob("*")) for d in (found, expected)]
    if names[0] != names[1]:
        return f"other files: {sorted(set(names[0]) ^ set(names[1]))[:3]}"
    files = [name for name in names[0] if (found / name).is_file()]
    _, unequal, broken = filecmp.cmpfiles(found, expected, files, shallow=False)
    return f"{[*unequal, *broken][0]} differs" if unequal or broken else ""


def subjects(inputs: Path) -> dict[str, Subject]:
    """The commands, on inputs that lie in ``inputs``."""
    convert = {
        "convert-import": ["import", str(inputs / "hf"), "out"],
        "convert-export": ["export", str(inputs / "megatron"), "out", "--dtype", "fp8"],
    }
    prepare = f"data prepare {CORPUS} --tokenizer {inputs / 'tokenizer'} --output out"
    chat = (
        f"data chat --input {inputs / 'dialogues.jsonl'} --tokenizer {inputs / 'tokenizer'} "
        "--sequence-length 2048 --workers 2 --output out"
    )
    return {
        "pretrain": Subject(shlex.split(TRAINING), training_phase, metrics_differ),
        "launch": Subject(shlex.split(LAUNCH), training_phase, metrics_differ),
        "data-prepare": Subject(shlex.split(prepare), data_phase, files_differ),
        "data-chat": Subject(shlex.split(chat), chat_phase, files_differ),
        **{
            name: Subject(["convert", *words], files_phase, files_differ)
            for name, words in convert.items()
        },
    }


def make_inputs(inputs: Path) -> None:
    """A release of block FP8, its import, a tokenizer, and dialogues."""
    inputs.mkdir()
    generate = [sys.executable, "benchmarks/generated_release.py", str(inputs / "hf")]
    run([*generate, "--preset", "k2-tiny", "--fp8"], REPOSITORY)
    run([*K2, "convert", "import", str(inputs / "hf"), str(inputs / "megatron")], inputs)
    train = f"data prepare {CORPUS} --train-bpe 1024 --output bpe"
    run([*K2, *shlex.split(train)], inputs)
    (inputs / "bpe" / "tokenizer").rename(inputs / "tokenizer")
    rng = random.Random(0)
    lines = [dialogues.sample(rng).to_line() for _ in range(3000)]
    (inputs / "dialogues.jsonl").write_text("".join(lines))


def run(command: list[str], place: Path) -> None:
    """A command to its end.

    Raises:
        RuntimeError: with the end of what it printed, if it fails.
    """
    done = subprocess.run(
        command, cwd=place, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}: {(done.stdout + done.stderr)[-600:]}")


BY_ITSELF = "failed by itself"
"""In place of a phase: no kill, and counted as one, so that a campaign ends."""


def kill_after(command: list[str], place: Path, seconds: float) -> bool:
    """Start ``command``, SIGKILL it and all it started after ``seconds``; False if it had ended.

    Raises:
        RuntimeError: it failed by itself before; with the end of what it printed.
    """
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, cwd=place, env=ENVIRONMENT, stdout=said, stderr=subprocess.STDOUT
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            started = _stopped(psutil.Process(process.pid))
            for each in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            psutil.wait_procs(started[1:])
            process.wait()
            return True
        if process.returncode:
            said.seek(0)
            text = said.read().decode(errors="replace")[-600:]
            raise RuntimeError(f"exit {process.returncode} by itself: {text}")
        return False


def _stopped(parent: psutil.Process) -> list[psutil.Process]:
    """A process and all it started, stopped one by one, so that none starts another meanwhile."""
    found = [parent]
    for each in found:  # grows
        with contextlib.suppress(psutil.NoSuchProcess):
            each.suspend()
            found += each.children()
    return found


def campaign(subject: Subject, kills: int, moments: random.Random, root: Path) -> list[str]:
    """Kill and run again ``kills`` times; what was lost, a line each, after the histogram."""
    command = [*K2, *subject.words]
    whole = root / "whole"
    whole.mkdir(parents=True)
    start = time.monotonic()
    run(command, whole)
    duration = time.monotonic() - start
    phases: Counter[str] = Counter()
    lost = []
    while sum(phases.values()) < kills:
        number = sum(phases.values())
        place = root / f"kill{number}"
        place.mkdir(exist_ok=True)
        moment = moments.uniform(0, duration)
        try:
            if not kill_after(command, place, moment):
                place.rename(root / f"ended{time.monotonic_ns()}")
                continue
        except RuntimeError as error:
            phases[BY_ITSELF] += 1
            lost.append(str(error))
            continue
        phases[subject.phase(place)] += 1
        try:
            run(command, place)
            fault = subject.same(place / "out", whole / "out")
        except RuntimeError as error:
            fault = str(error)
        if fault:
            lost.append(f"killed after {moment:.2f} s of {duration:.2f}: {fault}")
        if sys.stderr.isatty():
            print(f"\r{number + 1}/{kills}", end="", file=sys.stderr)
    for phase, count in phases.items():
        print(f"  {phase:<32} {count:>4} {'#' * count}", flush=True)
    return lost


def main(argv: list[str] | None = None) -> int:
    """Run the campaigns; exit code 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--kills", type=int, default=20, help="a command")
    parser.add_argument("--only", nargs="*", metavar="COMMAND", help="pretrain, launch, …")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        inputs = Path(name) / "inputs"
        make_inputs(inputs)
        found = subjects(inputs)
        if unknown := set(options.only or ()) - set(found):
            parser.error(f"{', '.join(unknown)}: expected {', '.join(found)}")
        num_lost = 0
        for command in options.only or found:
            print(f"{command}: {options.kills} kills", flush=True)
            moments = random.Random(f"{options.seed} {command}")
            lost = campaign(found[command], options.kills, moments, Path(name) / command)
            num_lost += len(lost)
            print("\n".join([f"  {len(lost)} lost", *(f"    {line}" for line in lost)]))
    print(f"{num_lost} lost")
    return min(num_lost, 1)


if __name__ == "__main__":
    sys.exit(main())
