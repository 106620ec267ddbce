"""``megatron-k2 rl``: reinforcement learning on tasks whose answers can be judged."""

import sys

from megatron_k2.cli.training_verb import start
from megatron_k2.rl.train import RL

HELP = """\
usage: megatron-k2 rl --preset NAME --load RUN --tasks FILE.json --chat-tokenizer DIR --save RUN
                      [--nproc N] [Megatron flags]

Samples groups of answers with the engine on rank 0, judges them, trains on every rank, and gives
the engine the new weights. Started again with the same --save, it goes on where it was: nothing
that was sampled is sampled again, and nothing trained on twice. The same program is
'torchrun --nproc-per-node N examples/rl_k2.py <flags>'.

  --preset NAME     model ('megatron-k2 presets' lists them)
  --load RUN        weights to start from
  --tasks FILE      task sets: tasks, weight, budget, temperature, held-out tasks (docs/rl.md)
  --iterations N    rounds of sampling (default 100)
  --prompts-per-iteration P, --group-size K   groups of K answers that end a round (32, 8)
  --mini-batches M  optimizer steps a round (default 1)
  --policy-loss sequence|token|window, --policy-tau T, --policy-length-scale sum|per-token
  --ptx-data DIR ..., --ptx-weight L   curated packs of 'megatron-k2 data chat' in every step
  --groups-in-play M, --max-decode-steps N   long answers go on in the next round
  --eval-every N    held-out tasks, at temperature 1 and greedy
  --critic FILE.json, --critic-refresh-every N   rubric rewards; lessons for the critic
  --rail NAME=BOUND, --on-alarm stop|warn|off   what is watched
  --lr              constant 1e-6; 2e-4 is for toy models only
  --seq-length S    of a pack, and of an engine's slot: prompt and answer together
  --save RUN        checkpoints, metrics, the ledger, a picture and a page of answers

Any other flag is Megatron's, and overrides the preset's.
"""


def main(argv: list[str]) -> int:
    """``megatron-k2 rl``: start the ranks; returns the exit code."""
    return start(argv, RL, "megatron_k2.rl.train", HELP)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
