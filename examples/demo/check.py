"""Read what the demo left behind and hold it against its bars; exit code 1 if one is not met."""

import json
import sys
from pathlib import Path

from megatron_k2.run.metrics import METRICS_FILE, read_records
from megatron_k2.terminal import show, table

MARGIN_NATS = 0.15
MIN_CLIPPED_HEAD_STEPS = 100
MAX_OVERSHOOT = 1.25


def main(out: Path) -> int:
    records = read_records(out / "run" / METRICS_FILE)
    threshold = json.loads((out / "run" / "run.json").read_text())["qk_clip_threshold"]
    bigram = json.loads((out / "data" / "ngram_baseline.json").read_text())["bigram_nats"]
    loss = json.loads((out / "evaluation.json").read_text())["loss_nats"]

    clipped = sum(r.num_clipped_heads for r in records)
    first = next((i for i, r in enumerate(records) if r.num_clipped_heads), len(records))
    peak = max((r.max_logit for r in records[first + 1 :]), default=float("nan"))
    bars = [
        ("validation loss below the bigram model", bigram - loss, ">=", MARGIN_NATS, "nat"),
        ("head-steps clipped", clipped, ">", MIN_CLIPPED_HEAD_STEPS, ""),
        ("largest logit after the first clip", peak / threshold, "<=", MAX_OVERSHOOT, "x tau"),
    ]
    is_met = {">=": float.__ge__, ">": float.__gt__, "<=": float.__le__}
    failed = False
    listed = table("bar", "measured", "wanted", "")
    for name, value, sign, bound, unit in bars:
        ok = is_met[sign](float(value), float(bound))
        failed |= not ok
        listed.add_row(name, f"{value:.4g}", f"{sign} {bound} {unit}", "ok" if ok else "NOT MET")
    show(listed)
    print(f"validation loss {loss:.4f} nats per token, bigram {bigram:.4f}")
    print(f"Hugging Face checkpoint: {out / 'hf'}; curves: {out / 'run' / 'report.png'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")))
