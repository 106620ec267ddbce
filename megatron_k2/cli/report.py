"""``megatron-k2 report RUN_DIR``: a run's metrics as one picture and a few lines."""

import argparse
from pathlib import Path


def main(argv: list[str]) -> int:
    """Draw the picture, print the summary."""
    parser = argparse.ArgumentParser(
        prog="megatron-k2 report",
        description="Draw metrics.jsonl of a run: loss, learning rate, attention logits and "
        "QK-Clip, expert load, speed. The run may still be going on.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="what --save named")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.png", help="default: RUN_DIR/report.png"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="TAU",
        help="QK-Clip's threshold, for a run without run.json",
    )
    arguments = parser.parse_args(argv)

    from megatron_k2.errors import UserError
    from megatron_k2.run.report.run import read_run
    from megatron_k2.run.report.summary import REPORT_FILE, summarise, write_heads, write_report

    output = arguments.output or arguments.run_dir / REPORT_FILE
    if output.suffix != ".png":
        raise UserError(f"--output {output}: expected a name that ends in .png")
    run = read_run(arguments.run_dir, arguments.threshold)
    write_report(run, output)
    heads = write_heads(run)
    print(f"{summarise(run)}\nreport     {output}{f', {heads}' if heads else ''}")
    return 0
