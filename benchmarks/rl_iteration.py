"""One iteration of RL, ours against ``transformers.generate`` and plain torch on the same model.

Ours is what ``megatron-k2 rl`` does between two lines of its log: the embedded engine samples K
answers a prompt, the trainer takes pi_old, learns in packs through Megatron's schedule with
MuonClip, and the engine is given the new weights; routes are recorded and replayed. Answers to a
prompt share its rows, as in a run; the peer reads it with each. Left out are tasks and their
judging: prompts are random ids, lengths are drawn beforehand, rewards alternate.
The peer (``rl_iteration_peer.py``) starts from the same weights as a Hugging Face directory, in a
process of its own. Both on one thread in fp32, in turns; ratios are of CPU seconds, the trainer's
divided between pi_old and step as its wall seconds are. The ceiling of a phase is what the whole
would gain if that phase took ours no time and the others what they take the peer.

    python benchmarks/rl_iteration.py [--preset k2-mini] [--prompt 256] [--group-size 8] [--seed 0]
    python benchmarks/rl_iteration.py --lengths log-normal        # median 64, at most 512
    python benchmarks/rl_iteration.py --quick
    python benchmarks/rl_iteration.py --trl-python PYTHON         # TRL's GRPOTrainer beside them
"""

import argparse
import asyncio
import contextlib
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from harness import machine_lock, print_inputs, print_result, summarize
from rl_iteration_peer import Seconds, Work, serve
from safetensors.torch import save_file

from megatron_k2.checkpoint.hf.config import hf_config, preset_from_args
from megatron_k2.engine.local.core import Core
from megatron_k2.engine.local.engine import LocalEngine
from megatron_k2.engine.local.weights import Weights
from megatron_k2.engine.protocol import Request, SamplingParams
from megatron_k2.presets import get_preset
from megatron_k2.records.rollouts import End
from megatron_k2.records.routes import Routes
from megatron_k2.rl.assembly import build
from megatron_k2.rl.checks import check_rl
from megatron_k2.rl.flags import add_rl_arguments, expand
from megatron_k2.rl.record import Group, Segment, Trajectory
from megatron_k2.rl.settings import settings_from
from megatron_k2.training.pretrain import Program, run
from megatron_k2.weight_sync.push import push
from megatron_k2.weight_sync.source import WeightSource

MEDIAN, SIGMA = 64, 1.0
"""Of log-normal lengths; sigma is ours."""
TAU, LR, DECAY = 0.1, 1e-6, 0.1
SAME = 1e-3
"""Nats a token between the two on our answers, before anything is learnt."""
RANK_VARIABLES = frozenset({"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"})
"""By which a trainer would join ours."""
PHASES = ("sample", "old", "step", "push")


def work_of(options: argparse.Namespace, vocab_size: int) -> Work:
    """Prompts, lengths and rewards, from the seed."""
    generator = torch.Generator().manual_seed(options.seed)
    shape = (options.prompts, options.group_size)
    prompts = torch.randint(4, vocab_size, (options.prompts, options.prompt), generator=generator)
    lengths = torch.full(shape, options.new)
    if options.lengths == "log-normal":
        drawn = torch.randn(shape, generator=generator) * SIGMA + math.log(MEDIAN)
        lengths = drawn.exp().round().long().clamp(1, 2 * options.new)
    rewards = (torch.arange(options.group_size) % 2).float().expand(shape)
    return Work(prompts, lengths, rewards, TAU, LR, DECAY)


class Ours:
    """The learner and the embedded engine, put together as a run does."""

    def __init__(self, config: Any, hooks: Any, work: Work) -> None:
        args = hooks.args
        self.work = work
        self._learner = build(config, hooks, settings_from(args))
        self.preset = preset_from_args(args, get_preset(args.preset))
        self._source = WeightSource(self._learner.stages, self.preset, dtype=torch.float32)
        self.weights = Weights(self.preset, torch.float32, torch.device("cpu"))
        slots = work.lengths.numel()
        core = Core(self.weights, num_slots=slots, max_length=args.seq_length, version="none")
        self._engine = LocalEngine(core)
        self._number = 0

    async def give(self) -> None:
        """The trainer's weights to the engine.

        Raises:
            SystemExit: they did not arrive.
        """
        found = await push(self._source, self._engine, str(self._learner.version))
        if not found.is_whole:
            raise SystemExit(found.detail)

    async def sample(self) -> list[Group]:
        """K answers to each prompt, of the lengths that were drawn."""
        rows = enumerate(self.work.lengths.tolist())
        wanted = [(i, k, n) for i, row in rows for k, n in enumerate(row)]
        found = await asyncio.gather(*(self._answer(*each) for each in wanted))
        size = self.work.lengths.shape[1]
        return [
            Group(i, "random", str(i), tuple(found[i * size : (i + 1) * size]))
            for i in range(len(self.work.prompts))
        ]

    async def _answer(self, i: int, k: int, length: int) -> Trajectory:
        prompt = tuple(self.work.prompts[i].tolist())
        seed = random.Random(f"{self._number} {i} {k}").getrandbits(32)
        params = SamplingParams(length, seed=seed, returns_routed_experts=True)
        read, wrote = [], []
        async for output in self._engine.generate(Request(f"{i} {k}", prompt, params)):
            read += output.prompt_tokens
            wrote += output.tokens
        routes = Routes.joined(token.routed_experts for token in (*read, *wrote)[:-1])
        segments = (
            Segment(prompt, routes=routes[: len(prompt)]),
            Segment(
                tuple(token.id for token in wrote),
                tuple(token.logprob for token in wrote),
                self._learner.version,
                routes=routes[len(prompt) :],
            ),
        )
        return Trajectory(segments, float(self.work.rewards[i, k]), {}, End.OVER)

    async def iteration(self) -> Seconds:
        """Sampling, pi_old and a step, weights."""
        self._number += 1
        marks = [_now()]
        groups = await self.sample()
        marks.append(_now())
        learnt = self._learner.learn(groups)
        marks.append(_now())
        await self.give()
        marks.append(_now())
        sampled, both, pushed = ((b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(marks))
        part = learnt.old_seconds / (learnt.old_seconds + learnt.step_seconds)
        old = (both[0] * part, both[1] * part)
        step = (both[0] - old[0], both[1] - old[1])
        return dict(zip(PHASES, (sampled, old, step, pushed), strict=True))

    async def close(self) -> None:
        """The engine's thread."""
        await self._engine.close()


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def write_release(ours: Ours, directory: Path) -> None:
    """The engine's weights as a Hugging Face directory."""
    config = hf_config(ours.preset, model_type="deepseek_v3")
    (directory / "config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.contiguous() for name, tensor in ours.weights.held.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )


def check_same(groups: list[Group], connection: Any) -> None:
    """The peer gives our first answer the log-probabilities that the engine drew it with."""
    answer = groups[0].trajectories[0]
    connection.send(torch.tensor([answer.token_ids]))
    worst = (connection.recv()[0] - torch.tensor(answer.segments[1].logprobs)).abs().max().item()
    print(f"log-probabilities of an answer: {worst:.1e} apart", flush=True)
    if worst > SAME:
        raise SystemExit("the two are not the same model")


async def compare(ours: Ours, options: argparse.Namespace) -> None:
    """Rounds of both in random order, the first not counted, and what came out."""
    await ours.give()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        write_release(ours, Path(folder))
        peer = context.Process(
            target=serve, args=(there, Path(folder), ours.work, options.seed), daemon=True
        )
        peer.start()
        there.close()  # so that its end is seen here
        choices = here.recv()
        print(f"peer: transformers DeepseekV3ForCausalLM, {choices}", flush=True)
        trl = trl_seconds(options, Path(folder), ours.work, choices) if options.trl_python else None
    check_same(await ours.sample(), here)
    order, found = random.Random(options.seed), {"ours": [], "peer": []}
    for _ in range(options.rounds + 1):
        for name in order.sample(["ours", "peer"], 2):
            if name == "ours":
                found[name].append(await ours.iteration())
            else:
                here.send("go")
                found[name].append(here.recv())
    here.send(None)
    peer.join()
    await ours.close()
    report({name: rounds[1:] for name, rounds in found.items()}, ours.work, trl)


def trl_seconds(options: argparse.Namespace, directory: Path, work: Work, choices: str) -> float:
    """CPU seconds of an iteration of TRL's trainer, the median of as many rounds."""
    said = {name: getattr(work, name).tolist() for name in ("prompts", "lengths", "rewards")}
    said |= {name: getattr(work, name) for name in ("tau", "lr", "decay")}
    (directory / "work.json").write_text(json.dumps(said))
    attention, experts = choices.rpartition(" ")[2].split("/")  # those it trains with
    words = [options.trl_python, str(Path(__file__).with_name("rl_iteration_trl.py"))]
    words += [str(directory), "--attention", attention, "--experts", experts]
    words += ["--steps", str(options.rounds + 1), "--seed", str(options.seed)]
    alone = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=alone)
    steps = summarize([tuple(each) for each in json.loads(done.stdout)[1:]])
    print(f"TRL: {steps.cpu_seconds:.2f} CPU s an iteration, spread {steps.spread:.2f}", flush=True)
    return steps.cpu_seconds


def report(found: dict[str, list[Seconds]], work: Work, trl: float | None) -> None:
    """Phases side by side, the whole, and the ceilings."""
    total = {
        name: summarize([tuple(map(sum, zip(*each.values(), strict=True))) for each in rounds])
        for name, rounds in found.items()
    }
    phases = {
        name: {p: summarize([each.get(p, (0.0, 1e-9)) for each in rounds]) for p in PHASES}
        for name, rounds in found.items()
    }
    theirs = total["peer"].cpu_seconds
    print(f"answers: {work.lengths.numel()} of {work.lengths.float().mean():.0f} tokens on average")
    print("| phase | ours CPU s | wall s | peer CPU s | wall s | ratio | ceiling |")
    print("|---|---|---|---|---|---|---|")
    for phase in PHASES:
        a, b = phases["ours"][phase], phases["peer"][phase]
        ceiling = theirs / (theirs - b.cpu_seconds) if theirs > b.cpu_seconds else math.inf
        print(
            f"| {phase} | {a.cpu_seconds:.2f} | {a.wall_seconds:.2f} | {b.cpu_seconds:.2f} "
            f"| {b.wall_seconds:.2f} | {b.cpu_seconds / a.cpu_seconds:.2f} | {ceiling:.2f} |"
        )
    a, b = total["ours"], total["peer"]
    print(f"whole: spread ours {a.spread:.2f}, peer {b.spread:.2f}")
    sampling = phases["peer"]["sample"].cpu_seconds
    ratios = {
        f"{p}_ratio": phases["peer"][p].cpu_seconds / phases["ours"][p].cpu_seconds
        for p in PHASES[:3]
    }
    print_result(
        ratio=theirs / a.cpu_seconds,
        **ratios,
        sample_ceiling=theirs / (theirs - sampling),
        ours_seconds=a.cpu_seconds,
        peer_seconds=theirs,
        **({} if trl is None else {"trl_ratio": trl / a.cpu_seconds, "trl_seconds": trl}),
    )


def flags_of(options: argparse.Namespace, work: Work) -> list[str]:
    """Of the run that ours is a part of."""
    longest = options.prompt + int(work.lengths.max())
    pack = max(options.pack or options.group_size * longest, longest)
    return f"""
        --preset {options.preset} --seq-length {pack} --max-position-embeddings {pack}
        --iterations {options.rounds + 1} --prompts-per-iteration {options.prompts}
        --group-size {options.group_size} --policy-tau {TAU} --lr {LR} --min-lr {LR}
        --weight-decay {DECAY} --seed {options.seed + 1} --log-interval 1000
    """.split()


def parsed() -> argparse.Namespace:
    """The command line; ``--quick`` is a shape of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--preset", default="k2-mini")
    add("--prompt", type=int, default=256, help="tokens of a prompt")
    add("--prompts", type=int, default=2, help="of an iteration")
    add("--group-size", type=int, default=8, help="answers to a prompt")
    add("--new", type=int, default=256, help="tokens of an answer; twice that at most if drawn")
    add("--lengths", choices=["equal", "log-normal"], default="equal")
    add("--pack", type=int, default=0, help="rows of a pack; by default the peer's micro-batch")
    add("--rounds", type=int, default=2)
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help="a shape that shows that it runs, nothing else")
    add("--trl-python", metavar="PYTHON", help="an interpreter with trl; answers of one length")
    options = parser.parse_args()
    if options.trl_python and options.lengths != "equal":
        parser.error("--trl-python: TRL cannot end answers at given lengths; use --lengths equal")
    if options.quick:
        vars(options).update(preset="k2-tiny", prompt=16, group_size=4, new=16, rounds=1)
    return options


def main() -> None:
    options = parsed()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    work, said = work_of(options, get_preset(options.preset).vocab_size), sys.stdout

    def loop(config: Any, _providers: object, hooks: Any) -> None:
        torch.set_flush_denormal(True)
        ours = Ours(config, hooks, work)
        with contextlib.redirect_stdout(said):
            asyncio.run(compare(ours, options))

    program = Program(
        "rl", expand, check_rl, lambda: (None, None), lambda _flags: [],
        arguments=add_rl_arguments, loop=loop,
    )  # fmt: skip
    with machine_lock():
        print_inputs(**vars(options))
        with contextlib.redirect_stdout(io.StringIO()):  # five hundred lines of arguments
            run(flags_of(options, work), program)


if __name__ == "__main__":
    main()
