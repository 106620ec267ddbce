"""Read what the demo left behind and hold it against its bars; exit code 1 if one is not met."""

import json
import statistics
import sys
from pathlib import Path

from megatron_k2.run.metrics import METRICS_FILE, read_records
from megatron_k2.terminal import show, table

FORMAT_EXACT, EXACT = 0.95, 0.50
LAST_STEPS = 20


def main(out: Path) -> int:
    """One epoch: no pack is seen twice, so a step's loss is that of packs it never saw."""
    losses = [record.loss for record in read_records(out / "run" / METRICS_FILE)]
    before, after = losses[0], statistics.fmean(losses[-LAST_STEPS:])
    answers = json.loads((out / "answers.json").read_text())
    held_out, other = answers["held_out"], answers["other_module"]
    bars = [
        ("calls in the exact format, held-out arguments", held_out["format"], FORMAT_EXACT),
        ("the wanted call, held-out arguments", held_out["exact"], EXACT),
    ]
    failed = False
    listed = table("bar", "measured", "wanted", "")
    for name, value, bound in bars:
        failed |= value < bound
        verdict = "ok" if value >= bound else "NOT MET"
        listed.add_row(name, f"{value:.0%}", f">= {bound:.0%}", verdict)
    show(listed)
    print(
        f"loss of targets {before:.3f} -> {after:.3f} nats (first step, mean of the last "
        f"{LAST_STEPS}); a module never trained on: format {other['format']:.0%}, the wanted call "
        f"{other['exact']:.0%}\nanswers: {out / 'answers.json'}; curves: "
        f"{out / 'run' / 'report.png'}"
    )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo-sft")))
