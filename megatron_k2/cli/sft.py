"""``megatron-k2 sft``: fine-tune on packed dialogues."""

import sys

from megatron_k2.cli.training_verb import start
from megatron_k2.sft.train import SFT

HELP = """\
usage: megatron-k2 sft --preset NAME --load RUN --data DIR [--save RUN] [--nproc N] [Megatron flags]

Fine-tunes on Megatron's own loop; each row of a batch is a pack of whole documents. Started again
with the same --save, it resumes from the last checkpoint. The same program is
'torchrun --nproc-per-node N examples/sft_k2.py <flags>'.

  --preset NAME   model ('megatron-k2 presets' lists them)
  --load RUN      weights to start from: a run's, or what 'megatron-k2 convert import' wrote
  --data DIR      made by 'megatron-k2 data chat'; or WEIGHT DIR WEIGHT DIR ..., of which one may be
                  pretraining text ('megatron-k2 data prepare')
  --epochs N      packs to draw, as a multiple of what the sets hold (default 2)
  --sft-loss token|sample   mean over the targets of a global batch (default), or over its samples
  --seq-length S  rows of a pack (the preset's); --global-batch-size counts packs (default 64)
  --lr, --min-lr  cosine from 2e-5 to 2e-6, over all of it, after at most 10 steps of warm-up
  --save RUN      checkpoints, metrics.jsonl, TensorBoard, logs, report.png
  --start-over    start from --load again, although --save has a checkpoint
  --nproc N       ranks on this machine (default 1)
  --optimizer muonclip (default) or any of Megatron's
  --print-args    print the flags this expands to, one a line, and stop

Any other flag is Megatron's, and overrides the preset's.
"""


def main(argv: list[str]) -> int:
    """``megatron-k2 sft``: start the ranks; returns the exit code."""
    return start(argv, SFT, "megatron_k2.sft.train", HELP)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
