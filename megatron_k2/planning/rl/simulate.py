"""Iterations of sampling played through: replicas, slots, long tails, answers that are resumed.

As ``rl/rollouts.py`` plays them, in seconds instead of steps: prompts in play are drawn when an
iteration begins, answers take slots in their order, those that were cut off first; so many whole
groups end it. Between two events (an answer is over, another begins) a replica decodes the same
answers, and its step's seconds grow in a straight line with what they hold, so that a stretch of
steps is one product. A resumed answer is read again, by the new weights.

With as many prompts in play as groups end an iteration, every answer is waited for.
"""

import heapq
from dataclasses import dataclass, field

from megatron_k2.planning.rl.decode import Replica
from megatron_k2.planning.rl.lengths import Lengths


@dataclass
class _Answer:
    """One answer, over all iterations it takes."""

    group: int
    length: int
    drawn: int = 0
    is_resumed: bool = False

    @property
    def is_over(self) -> bool:
        return self.drawn >= self.length


@dataclass(frozen=True)
class Stretch:
    """Steps of one replica between two events."""

    replica: int
    start: float
    end: float
    answers: int
    """Decoded meanwhile."""
    resumed: int
    """Of them those that an earlier iteration began; 0 answers: prompts are read."""


@dataclass(frozen=True)
class Rollout:
    """One iteration's sampling."""

    seconds: float
    stretches: tuple[Stretch, ...]
    drawn_tokens: int
    read_tokens: int
    """Prompts, and what resumed answers had drawn."""
    trained_tokens: int
    """Of the groups that ended it, prompts aside."""
    cut_off: int
    """Answers that go on in the next."""
    longest: int
    """Tokens of the longest answer of the groups that ended it."""

    def busy(self, slots: int) -> float:
        """Part of all replicas' slots in which something was decoded."""
        used = sum(s.answers * (s.end - s.start) for s in self.stretches)
        return used / (slots * self.seconds) if self.seconds else 0.0


@dataclass
class _Server:
    """A replica in the middle of an iteration.

    Every answer in it draws a token a step, so one counter of steps says how far each is.
    """

    number: int
    rates: Replica
    prompt: int
    now: float = 0.0
    steps: int = 0
    active: dict[int, _Answer] = field(default_factory=dict)
    ends: list[tuple[int, int]] = field(default_factory=list)
    """A heap: the step at which an answer is over, the answer."""
    held: int = 0
    """Tokens of all answers in it."""
    resumed: int = 0
    stretches: list[Stretch] = field(default_factory=list)
    drawn: int = 0
    read: int = 0

    def take(self, number: int, answer: _Answer) -> None:
        """Reads the answer's beginning, which the others wait for."""
        tokens = self.prompt + answer.drawn
        begin = self.now
        self.now += self.rates.prompt_seconds(tokens, tokens)
        self.stretches.append(Stretch(self.number, begin, self.now, 0, 0))
        self.read += tokens
        self.held += tokens
        self.resumed += answer.drawn > 0
        self.active[number] = answer
        heapq.heappush(self.ends, (self.steps + answer.length - answer.drawn, number))
        answer.drawn -= self.steps  # as if it had been here from the first step

    def seconds(self, steps: float) -> float:
        """The next ``steps``: linear in what is held, so the mean of the first and the last."""
        count = len(self.active)
        ends = (self.held, self.held + count * steps)
        first, last = (self.rates.step_seconds(count, held) for held in ends)
        return steps * (first + last) / 2

    def next_end(self) -> float:
        """When the next of its answers is over."""
        return self.now + self.seconds(self.ends[0][0] - self.steps)

    def advance(self, steps: int) -> list[int]:
        """Decodes that many steps; the answers that are over."""
        count = len(self.active)
        if steps and count:
            end = self.now + self.seconds(steps)
            self.stretches.append(Stretch(self.number, self.now, end, count, self.resumed))
            self.now, self.steps = end, self.steps + steps
            self.drawn += steps * count
            self.held += steps * count
        over = []
        while self.ends and self.ends[0][0] <= self.steps:
            over.append(self._leave(heapq.heappop(self.ends)[1]))
        return over

    def _leave(self, number: int) -> int:
        answer = self.active.pop(number)
        self.resumed -= answer.is_resumed
        answer.drawn += self.steps
        self.held -= self.prompt + answer.drawn
        return number

    def stop(self, when: float) -> None:
        """The whole steps until ``when``; everything leaves."""
        if self.active and when > self.now:
            low, high = 0, self.ends[0][0] - self.steps - 1
            while low < high:
                middle = (low + high + 1) // 2
                is_late = self.now + self.seconds(middle) > when
                low, high = (low, middle - 1) if is_late else (middle, high)
            self.advance(low)
        for number in list(self.active):
            self._leave(number)


@dataclass
class Simulation:
    """A run's iterations, one after another.

    Args:
        rates: of a replica.
        replicas: number of them.
        lengths: of answers.
        groups: whole ones that end an iteration.
        group_size: answers of each.
        groups_in_play: prompts at once; more than ``groups`` let long answers be resumed.
        seed: of the lengths; the same answers whatever is in play.
    """

    rates: Replica
    replicas: int
    lengths: Lengths
    groups: int
    group_size: int
    groups_in_play: int
    seed: int = 0
    _open: dict[int, list[_Answer]] = field(default_factory=dict)
    _next: int = 0

    def iteration(self) -> Rollout:
        """The next one."""
        while len(self._open) < self.groups_in_play:
            self._open[self._next] = [
                _Answer(self._next, self.lengths.draw(f"{self.seed}/{self._next}/{k}"))
                for k in range(self.group_size)
            ]
            self._next += 1
        answers = [a for group in self._open.values() for a in group if not a.is_over]
        for answer in answers:
            answer.is_resumed = answer.drawn > 0
        order = sorted(range(len(answers)), key=lambda number: not answers[number].is_resumed)
        servers = [
            _Server(number, self.rates, self.lengths.prompt) for number in range(self.replicas)
        ]
        end = self._play(servers, answers, order[::-1])
        for server in servers:
            server.stop(end)
        return self._settled(servers, end)

    def _play(self, servers: list[_Server], answers: list[_Answer], waiting: list[int]) -> float:
        """Until so many groups are whole; when that is."""
        for _ in range(self.rates.engines.slots):
            for server in servers:
                if waiting:
                    server.take(number := waiting.pop(), answers[number])
        left = {g: sum(not a.is_over for a in group) for g, group in self._open.items()}
        whole = sum(not count for count in left.values())
        events = [(server.next_end(), server.number) for server in servers if server.active]
        heapq.heapify(events)
        now = 0.0
        while whole < self.groups:
            now, which = heapq.heappop(events)
            server = servers[which]
            for number in server.advance(server.ends[0][0] - server.steps):
                left[answers[number].group] -= 1
                whole += not left[answers[number].group]
                if waiting:
                    server.take(taken := waiting.pop(), answers[taken])
            if server.active:
                heapq.heappush(events, (server.next_end(), which))
        return now

    def _settled(self, servers: list[_Server], end: float) -> Rollout:
        done = [g for g, group in self._open.items() if all(a.is_over for a in group)]
        trained = [a.length for g in done[: self.groups] for a in self._open.pop(g)]
        cut_off = sum(0 < a.drawn < a.length for group in self._open.values() for a in group)
        return Rollout(
            seconds=end,
            stretches=tuple(s for server in servers for s in server.stretches if s.start < end),
            drawn_tokens=sum(server.drawn for server in servers),
            read_tokens=sum(server.read for server in servers),
            trained_tokens=sum(trained),
            cut_off=cut_off,
            longest=max(trained),
        )
