"""Whole runs of reinforcement learning on this rank: ``python -m tests.rl.learner_worker JSON``.

A case is ``{"flags", "groups", "out"}``: flags for ``rl/train.py``'s program, a JSON file of
iterations of groups for a scripted collector, and a directory in which rank 0 leaves what the
engine held at each collection (``engine_N.pt``) and what the collector was asked and told. Further:

- ``samples``: the engine itself answers, with another selection bias than the trainer's, so that
  its routes are others;
- ``held``: each rank leaves what it held in each phase, in bytes, in ``held_RANK.json`` of ``out``;
- ``wrong``: the name of a mistake, see ``WRONG``.
"""

import asyncio
import contextlib
import json
import pickle
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch

from tests.rl.recorded import Scripted, lesson
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
    return pickle.loads(Path(path).read_bytes())


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

    def __init__(self, case, weights):
        super().__init__(recorded(case["groups"]))
        self._out, self._weights = Path(case["out"]), weights
        self._lessons = tuple(lesson(n) for n in range(2)) if case["is_taught"] else ()
        self._out.mkdir(parents=True, exist_ok=True)

    async def collect(self, iteration, version):
        held = {name: tensor.clone() for name, tensor in self._weights.held.items()}
        torch.save(held, self._out / f"engine_{iteration}.pt")
        found = await super().collect(iteration, version)
        self._note()
        return replace(found, lessons=self._lessons)

    async def committed(self, iteration):
        await super().committed(iteration)
        self._note()

    def _note(self):
        found = {"asked": self.asked, "commits": self.commits}
        (self._out / "collector.json").write_text(json.dumps(found))


class Sampled(Scripted):
    """Answers of the engine itself, which is given another selection bias than the trainer has."""

    def __init__(self, engine, weights):
        super().__init__(())
        self._engine, self._weights = engine, weights

    async def collect(self, iteration, version):
        generator = torch.Generator().manual_seed(5)
        for name, tensor in self._weights.held.items():
            if name.endswith("e_score_correction_bias"):
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
        answers = [self._answer(number, version) for number in range(8)]
        found = await asyncio.gather(*answers)
        from megatron_k2.rl.loop import Collected
        from megatron_k2.rl.record import Group

        groups = (Group(i, "toy", str(i), tuple(found[4 * i : 4 * i + 4])) for i in range(2))
        return Collected(tuple(groups))

    async def _answer(self, number, version):
        from megatron_k2.engine.protocol import Request, SamplingParams
        from megatron_k2.records.rollouts import End
        from megatron_k2.records.routes import Routes
        from megatron_k2.rl.record import Segment, Trajectory

        draw = random.Random(number // 4)
        prompt = tuple(draw.randrange(1, 128) for _ in range(6))
        params = SamplingParams(12, 0.8, seed=number, returns_routed_experts=True)
        read, wrote = [], []
        async for output in self._engine.generate(Request(str(number), prompt, params)):
            read += output.prompt_tokens
            wrote += output.tokens
        routes = Routes.joined(token.routed_experts for token in (*read, *wrote)[:-1])
        logprobs = tuple(token.logprob for token in wrote)
        ids = tuple(token.id for token in wrote)
        segments = (
            Segment(prompt, routes=routes[: len(prompt)]),
            Segment(ids, logprobs, version, 0.8, routes[len(prompt) :]),
        )
        return Trajectory(segments, float(number % 4 == 0), {}, End.OVER)


def run_case(case):
    from megatron_k2.rl import loop
    from megatron_k2.rl.train import program
    from megatron_k2.training.pretrain import run

    async def make_side(args, preset, iteration):
        engine, weights = local_engine(args)
        if case.get("samples"):
            return loop.Side(Sampled(engine, weights), engine)
        return loop.Side(Seen(case, weights), engine)

    with contextlib.ExitStack() as stack:
        if "wrong" in case:
            WRONG[case["wrong"]](stack)
        if case.get("held"):
            _note_held(stack, Path(case["out"]))
        run([*MODEL, *case["flags"]], program(make_side))


def _put(stack, owner, name, value):
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _note_held(stack, out):
    """Phases of the last iteration, after ``phases.held``."""
    import torch.distributed as dist

    from megatron_k2.rl.learner import Learner
    from megatron_k2.rl.phases import held

    noted, learn, rest = {}, Learner.learn, Learner.rest

    def note(learner, phase):
        noted[phase] = held(learner.stages, learner._stepper.optimizer)._asdict()
        out.mkdir(parents=True, exist_ok=True)
        (out / f"held_{dist.get_rank()}.json").write_text(json.dumps(noted))

    def learns(self, groups, lessons):
        found = learn(self, groups, lessons)
        note(self, "train")
        return found

    def rests(self, *, keeps_weights):
        rest(self, keeps_weights=keeps_weights)
        note(self, "update" if keeps_weights else "rollout")

    _put(stack, Learner, "learn", learns)
    _put(stack, Learner, "rest", rests)


def _one_answer_a_pack(stack):
    """No mistake: the oracle of packing."""
    import functools

    from megatron_k2.rl import batch

    _put(stack, batch, "pack", functools.partial(batch.pack, method="none"))


def _answers_forget_their_prompt(stack):
    """They share its rows and do not go on from them."""
    from megatron_k2.rl import rows

    original = rows.lay_out
    _put(stack, rows, "lay_out", lambda *given: original(*given[:3]))


def _dead_groups_count(stack):
    """Every group has the same weight, whatever its rewards."""
    from megatron_k2.rl import batch

    original = batch.advantages

    def advantages(rewards, groups):
        found = original(rewards, groups)
        weights = torch.full_like(found.weights, 1 / len(found.weights))
        return replace(found, weights=weights, num_live_groups=len(groups.unique()))

    _put(stack, batch, "advantages", advantages)


def _shares_squared_alone(stack):
    """A context-parallel rank squares its own share of an answer's log-ratio."""
    from megatron_k2.rl import step

    class Alone:
        @staticmethod
        def apply(shares, _group):
            return shares

    _put(stack, step, "_Joined", Alone)


def _heads_move_the_trunk(stack):
    """What verl #6432 reports: the prediction layers' loss goes on into the model."""
    from megatron.training import training

    original = training.setup_model_and_optimizer

    def setup(*args, cfg_container, **kwargs):
        cfg_container.model.transformer.mtp_detach_heads = False
        return original(*args, cfg_container=cfg_container, **kwargs)

    _put(stack, training, "setup_model_and_optimizer", setup)


def _no_bounds_on_middle_stages(stack):
    """What Megatron-Bridge #2952 reports: only the first and the last stage know the documents."""
    from megatron.core import mpu

    from megatron_k2.rl import learner

    original = learner.micro_batch

    def micro_batch(*args, **kwargs):
        batch = original(*args, **kwargs)
        is_end = mpu.is_pipeline_first_stage() or mpu.is_pipeline_last_stage()
        return batch if is_end else replace(batch, packed=None)

    _put(stack, learner, "micro_batch", micro_batch)


def _masks_ignore_versions(stack):
    """What slime #1445 reports: segments of older versions are trained on as if pi_old's."""
    from megatron_k2.rl import batch, rows

    for module in (batch, rows):
        _put(stack, module, "is_kept", lambda segment, version, keeps_old: segment.is_sampled)


def _a_stage_sends_what_it_held(stack):
    """What SkyRL #1345 reports: a pipeline stage gives out what it cached at the first round."""
    from megatron_k2.weight_sync import source

    original, first = source.pieces_of, {}

    def pieces_of(stages, rank):
        if rank == 0:
            return original(stages, rank)
        if not first:
            first.update(
                (box, tensor.clone()) for box, tensor in dict(original(stages, rank)).items()
            )
        return first

    _put(stack, source, "pieces_of", pieces_of)


WRONG = {
    "answers forget their prompt": _answers_forget_their_prompt,
    "a stage sends what it held": _a_stage_sends_what_it_held,
    "one answer a pack": _one_answer_a_pack,
    "dead groups count": _dead_groups_count,
    "shares squared alone": _shares_squared_alone,
    "heads move the trunk": _heads_move_the_trunk,
    "middle stages without bounds": _no_bounds_on_middle_stages,
    "masks ignore versions": _masks_ignore_versions,
}


if __name__ == "__main__":
    run_each(run_case, json.loads(Path(sys.argv[1]).read_text()))
