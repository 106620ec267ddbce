"""What PTX and the temperature's decay do: the demo's RL with and without each, on paired seeds.

    python examples/demo_rl/study.py [--out runs/demo-rl-study] [--seeds 1 2 3] [--iterations 21]

Goes on from the warm-up that ``make demo-rl`` left, and from the packed dialogues of ``make
demo-sft``, which are the PTX set. Where PTX is off its packs are read all the same, with a weight
of 1e-9, so that arms of a seed differ in nothing else. The loss on the PTX set is that of the last
checkpoint on the same packs for all, by the embedded engine. Run it again after an interruption:
runs resume. Prints a row a run, then the differences of each pair.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from check import held_out

from megatron_k2.engine.local.opened import core_of
from megatron_k2.engine.protocol import Request, SamplingParams
from megatron_k2.rl.history import Row, read_history
from megatron_k2.sft.packed_set import PackedSet

ARMS = {
    "both": (1.0, "linear:1.0:0.8:{}"),
    "no PTX": (1e-9, "linear:1.0:0.8:{}"),
    "no decay": (1.0, "1.0"),
}
"""The PTX weight (ours; the report's is not stated), and the temperature over the iterations."""
LENGTH, NUM_PACKS = 1024, 40
DOMAINS = f"{Path(__file__).parent}:{Path(__file__).parents[1] / 'demo_sft'}"
"""Where the task sets' domains are found."""
OFF = tuple(arm for arm in ARMS if arm != "both")


def task_sets(tasks: Path, temperature: str) -> Path:
    """The demo's, at another temperature; beside them, since they name files there."""
    sets = json.loads((tasks / "task_sets.json").read_text())
    for each in sets["task_sets"]:
        each["temperature"] = temperature
    path = tasks / f"{temperature.replace(':', '_')}.json"
    path.write_text(json.dumps(sets, indent=1) + "\n")
    return path


def run(arm: str, seed: int, options: argparse.Namespace) -> Path:
    """One run to its end; its directory."""
    weight, temperature = ARMS[arm]
    save = options.out / f"{arm.replace(' ', '_')}_{seed}"
    sets = task_sets(options.demo / "tasks", temperature.format(options.iterations))
    flags = f"""
        --preset k2-tiny --load {options.demo / "warm"} --tasks {sets}
        --chat-tokenizer {options.tokenizer} --save {save} --nproc {options.ranks}
        --seq-length 1024 --max-position-embeddings 1024 --iterations {options.iterations}
        --prompts-per-iteration {options.prompts} --group-size 8 --lr 4e-4 --min-lr 4e-4
        --eval-every {options.iterations - 1} --eval-samples 4 --save-interval 10 --seed {seed}
        --ptx-data {options.ptx} --ptx-weight {weight} --ptx-packs 4
    """.split()
    program = shutil.which("megatron-k2", path=str(Path(sys.executable).parent))
    if program is None:
        sys.exit("megatron-k2 is not installed beside this Python; run make venv")
    options.out.mkdir(parents=True, exist_ok=True)
    path, environment = options.out / "log.txt", os.environ | {"PYTHONPATH": DOMAINS}
    with path.open("a") as log:
        done = subprocess.run(
            [program, "rl", *flags], env=environment, check=False, stdout=log, stderr=log
        )
    if done.returncode:
        sys.exit(f"{save} ended with {done.returncode}: the end of {path} says why")
    return save


def found_in(save: Path, ptx: Path) -> dict[str, float]:
    """Held-out rewards at temperature 1 before and after, greedy after, and the PTX NLL."""
    tried = [row for row in read_history(save / "rl") if held_out(row, "sampled")]
    return {
        "before": _mean(tried[0], "sampled"),
        "after": _mean(tried[-1], "sampled"),
        "greedy": _mean(tried[-1], "greedy"),
        "ptx": ptx_nll(save, ptx),
    }


def ptx_nll(run: Path, folder: Path) -> float:
    """Nats per target of ``NUM_PACKS`` packs that are spread over the set."""
    packs = PackedSet(folder, "train", capacity=LENGTH)
    core = core_of(run, num_slots=8, max_length=LENGTH)
    masks = {}
    for number in range(NUM_PACKS):
        pack, first = packs[number * len(packs) // NUM_PACKS], 0
        for length in map(int, pack.lengths):
            here = slice(first, first + min(length, LENGTH))
            name, ids = f"{number}/{first}", tuple(map(int, pack.tokens[here]))
            masks[name], first = pack.loss_mask[here], first + length
            core.add(Request(name, ids, SamplingParams(max_tokens=0, prompt_logprobs=0)))
    found = []
    while core.has_work:
        for name, output in core.step():
            found += [
                -token.logprob
                for token, is_target in zip(output.prompt_tokens, masks[name], strict=False)
                if is_target and token.logprob is not None
            ]
    return statistics.fmean(found)


def _mean(row: Row, kind: str) -> float:
    return statistics.fmean(held_out(row, kind).values())


def main(options: argparse.Namespace) -> None:
    """All runs, then what is to be read off them."""
    print("inputs:", " ".join(f"{name}={value}" for name, value in vars(options).items()))
    rows: dict[tuple[str, int], dict[str, float]] = {}
    for seed in options.seeds:
        for arm in ARMS:
            rows[arm, seed] = found_in(run(arm, seed, options), options.ptx)
            said = "  ".join(f"{name} {value:.3f}" for name, value in rows[arm, seed].items())
            print(f"seed {seed}  {arm:9} {said}", flush=True)
    results = {}
    for arm in OFF:
        for name in ("ptx", "after", "greedy"):
            off = [rows[arm, seed][name] - rows["both", seed][name] for seed in options.seeds]
            each = ", ".join(f"{value:+.3f}" for value in off)
            print(f"{arm}, {name}: {each} against both on")
            results[f"{arm.replace(' ', '_')}_{name}"] = statistics.fmean(off)
    values = [rows["both", seed]["ptx"] for seed in options.seeds]
    results["ptx_spread"] = max(values) - min(values)
    print("RESULT", " ".join(f"{name}={value:.4f}" for name, value in results.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="RL of the demo with PTX and decay switched off")
    parser.add_argument("--out", type=Path, default=Path("runs/demo-rl-study"))
    parser.add_argument("--demo", type=Path, default=Path("runs/demo-rl"))
    parser.add_argument("--ptx", type=Path, default=Path("runs/demo-sft/set"))
    parser.add_argument("--tokenizer", type=Path, default=Path("runs/demo/data/tokenizer"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--iterations", type=int, default=21)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--ranks", type=int, default=2)
    main(parser.parse_args())
