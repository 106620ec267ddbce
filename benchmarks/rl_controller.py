"""What a trajectory costs the controller of RL: CPU, and memory while all of them are in flight.

The collector with its ledger, chat format, tokenizer and environments in this process, and engines
that have no model: ``engine/scripted.py``'s answers, given at once when they are due, as an answer
over HTTP comes. All requests are held until every answer of the iteration has asked, so that they
are in flight together; then they are given in random order.
process, whose CPU seconds then include the scripted answers' (said apart).

Counted is this process's CPU time from the first prompt that is drawn to the iteration's record on
disk. The ceiling is the issue's: 1 ms a trajectory, 2 GB.

    python benchmarks/rl_controller.py [--answers 20000] [--tokens 64] [--turns 1] [--seed 0]
    python benchmarks/rl_controller.py --http 2 --answers 2000
"""

import argparse
import asyncio
import random
import resource
import tempfile
import time
from collections.abc import AsyncGenerator
from pathlib import Path

from harness import machine_lock, print_inputs, print_result

from megatron_k2.chat.control import IM_END
from megatron_k2.chat.template import Renderer
from megatron_k2.data.tokenizer import load_tokenizer
from megatron_k2.engine.protocol import Output, Request, Token
from megatron_k2.engine.scripted import ScriptedEngine
from megatron_k2.gym.episode import Bounds
from megatron_k2.gym.protocol import Step, Task, Verdict, right, wrong
from megatron_k2.records.messages import Message
from megatron_k2.rewards.budget import Budget
from megatron_k2.rl.cluster.controller import collect_seldom
from megatron_k2.rl.curriculum import Stream
from megatron_k2.rl.cut import Cut
from megatron_k2.rl.ledger import Ledger
from megatron_k2.rl.plan import Iteration, Plan
from megatron_k2.rl.policy import Speaker
from megatron_k2.rl.rollouts import Collector
from megatron_k2.rl.synthetic import write_tokenizer
from megatron_k2.rl.task_sets import task_set_of

VOCAB_SIZE = 4096
GROUP_SIZE = 8
CEILING_MS, CEILING_GB = 1.0, 2.0


class Held(ScriptedEngine):
    """Gives nobody an answer before ``wanted`` have asked; then in random order, whole.

    Args:
        wanted: requests.
        end: token that ends an answer.
        num_tokens: of each.
        seed: of the order.
    """

    def __init__(self, wanted: int, end: int, num_tokens: int, seed: int) -> None:
        super().__init__(VOCAB_SIZE, 1 << 16)
        self._wanted, self._end, self._num_tokens = wanted, end, num_tokens
        self._draws = random.Random(seed)
        self._all_there = asyncio.Event()
        self._version = "0"
        self.most_in_flight = self._num_asked = 0
        self.seconds = 0.0
        """CPU that the answers took to be made."""

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """The answer, in one piece."""
        self._running.add(request.id)
        self._num_asked += 1
        self.most_in_flight = max(self.most_in_flight, len(self._running))
        if self._num_asked >= self._wanted:
            self._all_there.set()
        await self._all_there.wait()
        await asyncio.sleep(self._draws.random())
        begin = time.thread_time()
        ids = self._draws.choices(range(300, VOCAB_SIZE - 300), k=self._num_tokens - 1)
        tokens = tuple(Token(i, -0.5 - i / VOCAB_SIZE, (), "0") for i in (*ids, self._end))
        self.seconds += time.thread_time() - begin
        self._running.discard(request.id)
        yield Output(tokens, (), "stop", self._end)


class Counted:
    """An environment: a question, as many answers to it as there are turns, a verdict by length."""

    def __init__(self, turns: int) -> None:
        self._turns, self._said = turns, list[str]()

    async def reset(self, task: Task) -> Step:
        """The question."""
        return Step((Message("user", task.prompt),))

    async def step(self, action: Message) -> Step:
        """Another turn, or the end."""
        self._said.append(action.content)
        if len(self._said) >= self._turns:
            return Step(is_over=True)
        return Step((Message("user", "go on"),))

    async def verify(self) -> Verdict:
        """By the answer alone."""
        count = sum(map(len, self._said))
        return right(str(count)) if count % 2 else wrong(str(count))


class Counting:
    """The domain of those."""

    name = "counting"

    def __init__(self, turns: int) -> None:
        self._turns = turns

    def environment(self) -> Counted:
        """For one episode."""
        return Counted(self._turns)


def collector_of(options: argparse.Namespace, folder: Path) -> tuple[Collector, Held]:
    """A collector over scripted answers; its engine."""
    write_tokenizer(folder / "tokenizer", VOCAB_SIZE)
    renderer = Renderer(load_tokenizer(str(folder / "tokenizer")))
    groups = options.answers // GROUP_SIZE
    tasks = [
        Task("counting", f"Question {n}: how long is a piece of string?", {})
        for n in range(2 * groups)
    ]
    sets = (task_set_of("counting", tasks, Budget(options.turns * options.tokens + 64)),)
    stream = Stream(sets, options.seed)
    terms = {"seed": options.seed, "group_size": GROUP_SIZE}
    ledger = Ledger(folder / "ledger", stream, terms)
    engine = Held(options.answers, renderer.control.by_name[IM_END], options.tokens, options.seed)
    cut = Cut(groups * 2 // 3, options.answers)
    plan = Plan(GROUP_SIZE, cut, groups, options.answers, Bounds(seconds=36_000))
    speaker = Speaker(engine, renderer, options.seed)
    domains = {"counting": Counting(options.turns)}
    return Collector(plan, stream, speaker, domains, ledger), engine


def measure(options: argparse.Namespace, folder: Path) -> None:
    """One iteration, and what it took."""
    collector, engine = collector_of(options, folder)
    collect_seldom()
    before = _peak_gb()
    wall, cpu = time.perf_counter(), time.process_time()
    found: list[Iteration] = []

    async def collect() -> None:  # asyncio.run writes what it returns into a text, twice
        found.append(await collector.collect(0, 0))

    asyncio.run(collect())
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    drawn = found[0].facts["num_tokens"] + found[0].facts["num_dropped_tokens"]
    per_answer = (cpu - engine.seconds) / options.answers * 1e3
    print(
        f"{engine.most_in_flight:,} requests in flight; {len(found[0].groups):,} groups of "
        f"{GROUP_SIZE}, {drawn:,} tokens drawn, {wall:.1f} s, {cpu:.1f} s of CPU, of which "
        f"{engine.seconds:.1f} made answers; memory {before:.2f} -> {_peak_gb():.2f} GB"
    )
    print(f"ceiling: {CEILING_MS:g} ms of CPU a trajectory, {CEILING_GB:g} GB")
    print_result(in_flight=engine.most_in_flight, cpu_ms=per_answer, peak_gb=_peak_gb())


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    """Parse, print, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=int, default=20_000, help="in flight (20000)")
    parser.add_argument("--tokens", type=int, default=64, help="of a turn (64)")
    parser.add_argument("--turns", type=int, default=1, help="of an answer (1)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with machine_lock(), tempfile.TemporaryDirectory() as folder:
        print_inputs(**vars(options))
        measure(options, Path(folder))


if __name__ == "__main__":
    main()
