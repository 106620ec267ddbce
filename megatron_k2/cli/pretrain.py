"""``megatron-k2 pretrain``: train a preset on text."""

import sys

from megatron_k2.cli.training_verb import start
from megatron_k2.training.pretrain import PRETRAIN

HELP = """\
usage: megatron-k2 pretrain --preset NAME --data DIR [--save RUN] [--nproc N] [Megatron flags]

Trains on Megatron's own loop. Started again with the same --save, it resumes from the last
checkpoint. The same program is 'torchrun --nproc-per-node N examples/pretrain_k2.py <flags>'.

  --preset NAME   model and training defaults ('megatron-k2 presets' lists them)
  --data DIR      made by 'megatron-k2 data prepare'; or --mock-data
  --load RUN      start from another run's checkpoint, until --save has one of its own
  --start-over    start from there again, or anew, although --save has one
  --save RUN      checkpoints, metrics.jsonl, TensorBoard, logs, report.png
  --nproc N       ranks on this machine (default 1)
  --yarn          rotary scaling for the released context length
  --optimizer muonclip (default of every preset) or any of Megatron's
  --console megatron   Megatron's own output on the terminal
  --print-args    print the flags this expands to, one a line, and stop

Any other flag is Megatron's, and overrides the preset's.
"""


def main(argv: list[str]) -> int:
    """``megatron-k2 pretrain``: start the ranks; returns the exit code."""
    return start(argv, PRETRAIN, "megatron_k2.training.pretrain", HELP)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
