"""k2-tiny with and without FP8 storage of activations: final validation loss, seed by seed.

Both runs of a seed start from the same weights and see the same data; only what the experts keep
for backward differs. A third run of the seed differs from the first by a learning rate a millionth
larger, which is as good as rounding: where it ends elsewhere by as much, the comparison says
nothing about FP8, since routes that flip on rounding take two runs apart. Prints a table, and fails
if FP8's difference is over the bound in a seed.

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
RUNS = {"plain": (1.0, []), "fp8": (1.0, ["--fp8-activation-storage"]), "nudged": (1 + 1e-6, [])}
"""What each run of a seed has of its own: a factor of the learning rate, and flags."""


def megatron_k2(*arguments: str) -> None:
    """One verb in a process of its own; its output is shown only if it fails."""
    command = [sys.executable, "-m", "megatron_k2.cli.main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])


def training_flags(steps: int, batch: int, lr: float) -> list[str]:
    """The preset's schedule, stretched to ``steps`` and scaled to ``lr``."""
    samples = steps * batch
    return f"""
        --global-batch-size {batch} --train-samples {samples} --lr-decay-samples {samples}
        --lr-warmup-samples {samples // 12} --lr-wsd-decay-samples {samples * 2 // 5}
        --lr {lr} --min-lr {lr / 10} --save-interval {steps} --eval-iters 0
    """.split()


def final_loss(data: str, out: Path, seed: int, flags: list[str]) -> float:
    """Train, and the mean loss over every held-out token, in nats."""
    result = out / "evaluation.json"
    if not result.exists():
        run = ["--preset", "k2-tiny", "--data", data, "--save", str(out), "--seed", str(seed)]
        megatron_k2("pretrain", *run, *flags)
        megatron_k2("evaluate", "--load", str(out), "--data", data, "--json", str(result))
    return json.loads(result.read_text())["loss_nats"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/fp8_storage"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch", type=int, default=16, help="sequences of 256 tokens a step")
    parser.add_argument("--lr", type=float, default=4e-3, help="the preset's is 4e-3")
    arguments = parser.parse_args()
    steps, batch, data = arguments.steps, arguments.batch, arguments.data
    worst: dict[str, float] = dict.fromkeys(("fp8", "nudged"), 0.0)
    print("| seed | plain | FP8 storage | difference | nudged | difference | s |")
    print("|---|---|---|---|---|---|---|")
    for seed in arguments.seeds:
        started = time.monotonic()
        losses = {}
        for name, (factor, own) in RUNS.items():
            flags = [*training_flags(steps, batch, arguments.lr * factor), *own]
            losses[name] = final_loss(data, arguments.out / f"{name}{seed}", seed, flags)
        away = {name: losses[name] / losses["plain"] - 1 for name in worst}
        worst = {name: max(worst[name], abs(away[name])) for name in worst}
        print(
            f"| {seed} | {losses['plain']:.5f} | {losses['fp8']:.5f} | {away['fp8']:+.3%} "
            f"| {losses['nudged']:.5f} | {away['nudged']:+.3%} "
            f"| {time.monotonic() - started:.0f} |",
            flush=True,
        )
    is_met = worst["fp8"] < BOUND
    print(
        f"RESULT worst={worst['fp8']:.3e} nudged={worst['nudged']:.3e} bound={BOUND} "
        f"is_met={is_met}"
    )
    sys.exit(not is_met)


if __name__ == "__main__":
    main()
