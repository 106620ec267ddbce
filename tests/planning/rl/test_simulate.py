"""Iterations played through by events against a twin that takes one step after another."""

import itertools
from dataclasses import dataclass

import pytest

from megatron_k2.planning.estimate import Assumptions
from megatron_k2.planning.gpus import get_gpu
from megatron_k2.planning.rl.decode import replica
from megatron_k2.planning.rl.lengths import Lengths
from megatron_k2.planning.rl.request import EngineLayout
from megatron_k2.planning.rl.simulate import Simulation
from megatron_k2.presets import KIMI_K2

LENGTHS = Lengths(median=60, sigma=1.0, most=500, prompt=20)
RATES = replica(KIMI_K2, get_gpu("h800"), EngineLayout(1, 4, slots=32), Assumptions())
GROUPS, SIZE, REPLICAS = 12, 4, 2


def simulation(in_play, rates=RATES, replicas=REPLICAS):
    return Simulation(rates, replicas, LENGTHS, GROUPS, SIZE, in_play, seed=3)


@dataclass
class Slow:
    """The twin: every step of every replica, one after another, the one that is behind first."""

    in_play: int
    is_aware: bool = True
    """Whether a resumed answer is read again; the wrong variant forgets."""

    def __post_init__(self):
        self.open, self.next = {}, 0

    def iteration(self):
        while len(self.open) < self.in_play:
            self.open[self.next] = [[LENGTHS.draw(f"3/{self.next}/{k}"), 0] for k in range(SIZE)]
            self.next += 1
        todo = [(g, k) for g, group in self.open.items() for k in range(SIZE)]
        todo = [(g, k) for g, k in todo if self.open[g][k][1] < self.open[g][k][0]]
        todo.sort(key=lambda place: self.open[place[0]][place[1]][1] == 0)
        now, active = [0.0] * REPLICAS, [[] for _ in range(REPLICAS)]

        def take(which):
            if todo:
                g, k = todo.pop(0)
                drawn = self.open[g][k][1] if self.is_aware else 0
                tokens = LENGTHS.prompt + drawn
                now[which] += RATES.prompt_seconds(tokens, tokens)
                active[which].append((g, k))

        for _ in range(32):
            for which in range(REPLICAS):
                take(which)
        while self._whole() < GROUPS:
            which = min((w for w in range(REPLICAS) if active[w]), key=lambda w: now[w])
            held = sum(LENGTHS.prompt + self.open[g][k][1] for g, k in active[which])
            # the mean of what is held before and behind the step
            held += len(active[which]) / 2
            now[which] += RATES.step_seconds(len(active[which]), held)
            for place in list(active[which]):
                answer = self.open[place[0]][place[1]]
                answer[1] += 1
                if answer[1] == answer[0]:
                    active[which].remove(place)
                    end = now[which]
                    take(which)
        done = [g for g in self.open if all(a == b for a, b in self.open[g])]
        trained = sum(length for g in done[:GROUPS] for length, _ in self.open.pop(g))
        return end, trained

    def _whole(self):
        return sum(all(a == b for a, b in group) for group in self.open.values())


@pytest.mark.parametrize("in_play", [GROUPS, GROUPS + 8])
def test_events_are_steps_one_after_another(in_play):
    fast, slow = simulation(in_play), Slow(in_play)
    for _ in range(3):
        found, (seconds, trained) = fast.iteration(), slow.iteration()
        assert found.seconds == pytest.approx(seconds, rel=2e-3)
        assert found.trained_tokens == trained


def test_a_twin_that_does_not_read_again_would_be_seen():
    fast, slow = simulation(GROUPS + 8), Slow(GROUPS + 8, is_aware=False)
    pairs = [(fast.iteration().seconds, slow.iteration()[0]) for _ in range(3)]
    assert pairs[0][0] == pytest.approx(pairs[0][1], rel=2e-3), "nothing is resumed yet"
    assert pairs[2][0] != pytest.approx(pairs[2][1], rel=1e-3)


def test_without_resumed_answers_an_iteration_waits_for_its_longest():
    run = simulation(GROUPS)
    for number in range(3):
        found = run.iteration()
        lengths = [
            LENGTHS.draw(f"3/{g}/{k}")
            for g in range(number * GROUPS, (number + 1) * GROUPS)
            for k in range(SIZE)
        ]
        assert found.longest == max(lengths)
        assert found.trained_tokens == found.drawn_tokens == sum(lengths)
        assert found.read_tokens == GROUPS * SIZE * LENGTHS.prompt
        assert found.cut_off == 0


def test_nothing_is_drawn_twice_and_nothing_is_lost():
    run = simulation(GROUPS + 8)
    found = [run.iteration() for _ in range(6)]
    left = sum(a.drawn for group in run._open.values() for a in group)
    assert sum(f.drawn_tokens for f in found) == sum(f.trained_tokens for f in found) + left
    assert any(f.cut_off for f in found)


def test_resuming_saves_seconds_of_the_same_answers():
    waits, resumes = simulation(GROUPS), simulation(GROUPS + 8)
    whole, partial = ([run.iteration() for _ in range(8)][2:] for run in (waits, resumes))
    assert sum(f.seconds for f in partial) < 0.85 * sum(f.seconds for f in whole)


def test_stretches_tile_a_replicas_time_and_stay_within_its_slots():
    found = simulation(GROUPS + 8).iteration()
    for number in range(REPLICAS):
        own = [s for s in found.stretches if s.replica == number]
        assert own[0].start == 0
        for before, after in itertools.pairwise(own):
            assert after.start == pytest.approx(before.end)
        assert all(0 <= s.resumed <= s.answers <= 32 for s in own)
    assert 0 < found.busy(REPLICAS * 32) <= 1
