"""Whole runs of reinforcement learning on this rank: ``python -m tests.rl.learner_worker JSON``.

A case is ``{"flags", "groups", "out"}``: flags for ``rl/train.py``'s program, a JSON file of
iterations of groups for a scripted collector, and a directory in which rank 0 leaves what the engine
held after each sync (``engine_N.pt``) and what the collector was asked. ``wrong`` names a mistake.
"""

import contextlib
import json
import sys
from pathlib import Path

import torch

from tests.rl.recorded import Scripted
from tests.support.cases import run_each

MODEL = """
    --preset k2-tiny --hidden-size 64 --ffn-hidden-size 96 --num-layers 4
    --q-lora-rank 32 --kv-lora-rank 16 --qk-head-dim 16 --qk-pos-emb-head-dim 8 --v-head-dim 16
    --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 32
    --moe-shared-expert-intermediate-size 32 --vocab-size 128 --seq-length 64
    --max-position-embeddings 64 --qk-clip-threshold 20 --seed 26 --log-interval 1
    --lr 2e-4 --min-lr 2e-4 --lr-warmup-iters 0 --console megatron
""".split()


def recorded(path):
    from megatron_k2.rl.record import group_from

    return [[group_from(row) for row in groups] for groups in json.loads(Path(path).read_text())]


def local_engine(args):
    """An engine in this process with room for the model, whose weights come with the first sync."""
    from megatron_k2.checkpoint.hf.config import preset_from_args
    from megatron_k2.engine.local.core import Core
    from megatron_k2.engine.local.engine import LocalEngine
    from megatron_k2.engine.local.weights import Weights
    from megatron_k2.presets import get_preset

    preset = preset_from_args(args, get_preset(args.preset))
    weights = Weights(preset, torch.float32, torch.device("cpu"))
    return LocalEngine(Core(weights, num_slots=4, max_length=args.seq_length)), weights


class Seen(Scripted):
    """Leaves beside what it was asked what the engine holds at that moment."""

    def __init__(self, iterations, out, weights):
        super().__init__(iterations)
        self._out, self._weights = Path(out), weights

    async def collect(self, iteration, version):
        held = {name: tensor.clone() for name, tensor in self._weights.held.items()}
        torch.save(held, self._out / f"engine_{iteration}.pt")
        found = await super().collect(iteration, version)
        self._note()
        return found

    def committed(self, iteration):
        super().committed(iteration)
        self._note()

    def _note(self):
        found = {"asked": self.asked, "commits": self.commits}
        (self._out / "collector.json").write_text(json.dumps(found))


def run_case(case):
    from megatron_k2.rl.loop import Side
    from megatron_k2.rl.train import program
    from megatron_k2.training.pretrain import run

    def make_side(args):
        engine, weights = local_engine(args)
        Path(case["out"]).mkdir(parents=True, exist_ok=True)
        return Side(Seen(recorded(case["groups"]), case["out"], weights), engine)

    with contextlib.ExitStack() as stack:
        if "wrong" in case:
            WRONG[case["wrong"]](stack)
        run([*MODEL, *case["flags"]], program(make_side))


WRONG = {}


if __name__ == "__main__":
    run_each(run_case, json.loads(Path(sys.argv[1]).read_text()))
