"""An engine, a format and environments for the collector: hashed answers, no model, no worker."""

import asyncio
import hashlib
import random
from dataclasses import dataclass, field

from megatron_k2.chat.control import CHAT_TOKENS, IM_END
from megatron_k2.chat.template import Format, Renderer
from megatron_k2.engine.protocol import Token
from megatron_k2.engine.scripted import Faults, ScriptedEngine
from megatron_k2.gym.episode import Bounds
from megatron_k2.gym.protocol import Step, Task, right, wrong
from megatron_k2.records.messages import Message
from megatron_k2.rewards.budget import Budget
from megatron_k2.rl.curriculum import Curriculum, Stream
from megatron_k2.rl.cut import Cut
from megatron_k2.rl.ledger import Ledger
from megatron_k2.rl.plan import Plan
from megatron_k2.rl.policy import Speaker
from megatron_k2.rl.rollouts import Collector
from megatron_k2.rl.task_sets import task_set_of

LETTERS = "0123456789ab"
BUDGET = 40


class Letters:
    """A token a letter; ``ab`` has a token of its own, as in any BPE."""

    identity = "letters"
    special_ids = {name: 129 + place for place, name in enumerate(CHAT_TOKENS)}  # noqa: RUF012
    vocab_size = 160
    merged = 128

    def encode(self, text):
        ids = [min(ord(letter), 127) for letter in text]
        found = []
        for number in ids:
            if found and (found[-1], number) == (ord("a"), ord("b")):
                found[-1] = self.merged
            else:
                found.append(number)
        return found

    def decode(self, ids):
        names = {number: name for name, number in self.special_ids.items()} | {self.merged: "ab"}
        return "".join(names.get(number) or chr(number) for number in ids)


END = Letters.special_ids[IM_END]
RENDERER = Renderer(Letters(), Format(default_system="s"))


def drawn(*parts):
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


class DrawingEngine(ScriptedEngine):
    """Each token by hash of seed, place and weights; an answer ends after a few, or dozens.

    Args:
        weights: anything; what is drawn hangs on it.
        version: the engine's tag.
        jitter: seconds that a token takes at most, drawn anew each time.
    """

    def __init__(self, weights="", version=0, jitter=0.0, max_length=4096, **more):
        super().__init__(Letters.vocab_size, max_length, Faults(), **more)
        self.weights, self._version, self._jitter = weights, str(version), jitter
        self.requests = []

    def set(self, weights, version):
        self.weights, self._version = weights, str(version)

    def _answer(self, request):
        self.requests.append(request)
        if self._script:
            return super()._answer(request)
        params, found = request.params, []
        size = 4 if drawn(request.id.split("/")[0]) < 0.7 else 24
        for place in range(params.max_tokens):
            seed = params.seed if params.temperature else 0
            r = drawn(seed, len(request.prompt) + place, self.weights)
            token = END if r < 1 / size else ord(LETTERS[int(r * 1e6) % len(LETTERS)])
            found.append(Token(token, -r - 0.01, (), self._version))
            if token == END:
                break
        return found

    async def generate(self, request):
        async for output in super().generate(request):
            if self._jitter:
                await asyncio.sleep(random.random() * self._jitter)  # of the clock, not of a seed
            yield output


@dataclass
class Talk:
    """So many turns; right where the digits said are even in number."""

    calls: dict = field(default_factory=dict)
    said: list = field(default_factory=list)

    async def reset(self, task):
        self.task, self.said = task, []
        return Step((Message("user", task.prompt),))

    async def step(self, action):
        self.said.append(action.content)
        if self.task.reference.get("hangs"):
            await asyncio.sleep(3600)
        if len(self.said) >= self.task.reference["turns"]:
            return Step(is_over=True)
        return Step((Message("user", f"go on, {len(self.said)}"),))

    async def verify(self):
        count = sum(letter.isdigit() for letter in "".join(self.said))
        return wrong(str(count)) if count % 2 else right(str(count))


class Talking:
    name = "talk"

    def __init__(self, environment=Talk):
        self._environment = environment
        self.num_environments = 0

    def environment(self):
        self.num_environments += 1
        return self._environment()


def tasks(number, turns=2, **reference):
    return [
        Task("talk", f"question {turns} {n}", {"turns": turns, **reference}) for n in range(number)
    ]


def two_sets():
    one = task_set_of("short", tasks(12, 1), Budget(BUDGET), 3, weight=2.0)
    other = task_set_of("long", [*tasks(8, 3), *tasks(2, 2, hangs=True)], Budget(3 * BUDGET, 0.25))
    return one, other


QUICK = Bounds(call_seconds=0.5, seconds=20, wait_seconds=0.001, num_tries=1)
PLAN = Plan(3, Cut(2, 8), groups_in_play=4, concurrency=8, bounds=QUICK)


@dataclass
class Made:
    """A collector with all that it stands on."""

    collector: Collector
    ledger: Ledger
    engine: DrawingEngine
    speaker: Speaker
    domain: Talking

    def collect(self, iteration, version=None):
        number = iteration if version is None else version
        self.engine.set(self.engine.weights, number)
        return asyncio.run(self.collector.collect(iteration, number))

    def close(self):
        self.ledger.close()


def made(
    folder, plan=PLAN, engine=None, sets=None, seed=5, curriculum=None, tell=print, domain=None,
    ledger_class=Ledger, **more,
):  # fmt: skip
    engine, domain = engine or DrawingEngine(), domain or Talking()
    stream = Stream(sets or two_sets(), seed, curriculum or Curriculum(6))
    ledger = ledger_class(folder, stream, {"seed": seed, "group_size": plan.group_size}, tell)
    speaker = Speaker(engine, RENDERER, seed, **more)
    collector = Collector(plan, stream, speaker, {"talk": domain}, ledger)
    return Made(collector, ledger, engine, speaker, domain)
