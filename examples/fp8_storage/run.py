"""k2-tiny with and without FP8 storage of activations: final validation loss, seed by seed.

Both runs of a seed start from the same weights and see the same data; only what the experts keep
for backward differs. Prints a table and fails if a seed's losses differ by more than the bound.

    megatron-k2 data prepare --python-stdlib --train-bpe 4096 --output runs/demo/data
    python examples/fp8_storage/run.py --data runs/demo/data --seeds 1 2 3
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

BOUND = 2e-3
"""Relative difference of the final validation loss."""


def megatron_k2(*arguments: str) -> None:
    """One verb in a process of its own; its output is shown only if it fails."""
    command = [sys.executable, "-m", "megatron_k2.cli.main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])


def training_flags(steps: int, batch: int) -> list[str]:
    """The preset's schedule, shortened."""
    samples = steps * batch
    return f"""
        --global-batch-size {batch} --train-samples {samples} --lr-decay-samples {samples}
        --lr-warmup-samples {samples // 12} --lr-wsd-decay-samples {samples * 2 // 5}
        --save-interval {steps} --eval-iters 0
    """.split()


def final_loss(data: str, out: Path, seed: int, flags: list[str]) -> float:
    """Train, and the mean loss over every held-out token, in nats."""
    if not (out / "evaluation.json").exists():
        run = ["--preset", "k2-tiny", "--data", data, "--save", str(out), "--seed", str(seed)]
        megatron_k2("pretrain", *run, *flags)
        result = str(out / "evaluation.json")
        megatron_k2("evaluate", "--load", str(out), "--data", data, "--json", result)
    return json.loads((out / "evaluation.json").read_text())["loss_nats"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/fp8_storage"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch", type=int, default=16, help="sequences of 256 tokens a step")
    arguments = parser.parse_args()
    flags, worst = training_flags(arguments.steps, arguments.batch), 0.0
    print("| seed | plain | FP8 storage | difference |\n|---|---|---|---|")
    for seed in arguments.seeds:
        started = time.monotonic()
        plain = final_loss(arguments.data, arguments.out / f"plain{seed}", seed, flags)
        stored = final_loss(
            arguments.data,
            arguments.out / f"fp8{seed}",
            seed,
            [*flags, "--fp8-activation-storage"],
        )
        difference = (stored - plain) / plain
        worst = max(worst, abs(difference))
        print(f"| {seed} | {plain:.5f} | {stored:.5f} | {difference:+.4%} |", flush=True)
        print(f"({time.monotonic() - started:.0f} s)", file=sys.stderr)
    print(f"RESULT worst={worst:.3e} bound={BOUND} is_met={worst < BOUND}")
    sys.exit(worst >= BOUND)


if __name__ == "__main__":
    main()
