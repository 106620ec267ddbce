"""The loop itself, over strict stand-ins of what it calls: order, syncs, commits, a failed sync."""

import asyncio
from types import SimpleNamespace

import pytest
import torch

from megatron_k2.engine.protocol import EngineError, UpdateCode, UpdateError
from megatron_k2.rl.learner import Ended
from megatron_k2.rl.loop import MOST_ROUNDS, Side, run
from megatron_k2.rl.waiting import waiting_of_ranks
from tests.rl.recorded import Scripted, iteration
from tests.support.single_rank import one_rank


class Learner:
    """Takes a step where told to; notes what it did."""

    def __init__(self, log, takes, iteration=0, saves=(), ends=None):
        self.log, self.takes, self.saves, self.ends = log, takes, saves, ends
        self.iteration, self.version = iteration, sum(takes[:iteration])
        self.state = "awake"

    def rest(self, *, keeps_weights):
        assert not (keeps_weights and self.state == "at rest")
        self.state = "weights alone" if keeps_weights else "at rest"

    def wake(self):
        self.state = "awake"

    def learn(self, groups):
        assert self.state == "awake"
        self.log.append(f"learn {len(groups)}")
        self.version += self.takes[self.iteration]
        self.iteration += 1

    def end_iteration(self, *, is_last):
        assert self.state == "awake"
        assert is_last is (self.iteration == len(self.takes))
        is_saved = self.iteration in self.saves
        if is_saved:
            self.log.append("save")
        return Ended(is_saved, self.iteration == self.ends)

    def save_now(self):
        assert self.state == "awake"
        self.log.append("save now")


class Engine:
    """Takes all weights, or fails at a version: so often, or always."""

    def __init__(self, log, fails="", code=UpdateCode.CHECKSUM, times=99):
        self.log, self.fails, self.version, self.code, self.times = log, fails, "", code, times

    async def update_weights(self, weights, version, manifest=None):
        assert [name for name, _ in weights] == ["w"]
        if version == self.fails and self.times:
            self.times -= 1
            self.log.append("fails")
            raise UpdateError(self.code, "other bits")
        self.version = version
        self.log.append(f"sync {version}")

    def health(self):
        return SimpleNamespace(weight_version=self.version)


class Source:
    """One tensor, on the only rank, while the weights can be read and ranks can talk."""

    is_root, group = True, None

    def __init__(self, learner):
        self.learner = learner

    def tensors(self):
        assert self.learner.state == "weights alone"
        yield "w", torch.zeros(2)


class Noted(Scripted):
    """Writes into the same log."""

    def __init__(self, log, learner, loses, never_ends):
        super().__init__([iteration(seed) for seed in range(4)])
        self.log, self.loses, self.never_ends = log, list(loses), never_ends
        self.learner = learner

    async def probes(self, version):
        assert self.learner.state == "at rest"
        return ()

    async def collect(self, iteration, version):
        assert self.learner.state == "at rest"
        self.log.append(f"collect {iteration} at {version}")
        if self.never_ends == iteration:
            await asyncio.sleep(3600)
        if iteration in self.loses:
            self.loses.remove(iteration)
            return None
        return await super().collect(iteration, version)

    async def committed(self, iteration):
        self.log.append(f"commit {iteration}")


def _run(
    takes, *, begin=0, saves=(2, 3), ends=None, show=lambda _: None, loses=(), never_ends=None,
    **engine,
):  # fmt: skip
    log = []
    learner = Learner(log, takes, begin, saves, ends)
    side = Side(Noted(log, learner, loses, never_ends), Engine(log, **engine))
    with one_rank():
        waiting = waiting_of_ranks(lambda: log[-1:] == [f"collect {never_ends} at 1"])
        try:
            asyncio.run(
                run(
                    learner,
                    Source(learner),
                    side,
                    waiting=waiting,
                    iterations=len(takes),
                    show=show,
                )
            )
        except EngineError as error:
            log.append(str(error))
    return log


def test_collect_learn_sync_and_commit_what_a_checkpoint_holds():
    """No sync where no step was taken."""
    assert _run([1, 0, 2]) == [
        *("sync 0", "collect 0 at 0", "learn 4"),
        *("sync 1", "collect 1 at 1", "learn 4", "save", "commit 1"),
        *("collect 2 at 1", "learn 4", "save", "commit 2"),
    ]


def test_a_resumed_run_gives_the_engine_its_weights_first():
    log = _run([1, 1, 1], begin=2)
    assert log[:2] == ["sync 2", "collect 2 at 2"]
    assert _run([1, 1, 1], begin=3) == []


def test_weights_that_did_not_arrive_end_the_run_before_anything_is_sampled():
    log = _run([1, 1], fails="1", saves=(1, 2))
    assert log[-4:] == [
        *("save", "commit 0", "fails", "weights of version 1 did not arrive: other bits"),
    ]


def test_a_round_at_which_every_engine_failed_is_begun_again():
    assert _run([1], fails="0", code=UpdateCode.ENGINE, times=MOST_ROUNDS - 1, saves=()) == [
        *["fails"] * (MOST_ROUNDS - 1),
        *("sync 0", "collect 0 at 0", "learn 4"),
    ]
    log = _run([1], fails="0", code=UpdateCode.ENGINE, times=MOST_ROUNDS, saves=())
    assert log[-2:] == ["fails", "weights of version 0 did not arrive: other bits"]


def test_whoever_watches_may_end_the_run_before_it_is_saved():
    def stop(found):
        assert (found.number, found.sync.version, len(found.collected.groups)) == (0, "0", 4)
        raise EngineError("enough")

    log = _run([1, 1], saves=(1, 2), show=stop)
    assert log[-2:] == ["learn 4", "enough"]


def test_megatrons_exit_flags_end_it_when_what_is_saved_is_committed():
    log = _run([1, 1, 1], saves=(2,), ends=2)
    assert log[-3:] == ["learn 4", "save", "commit 1"]


def test_without_a_place_to_save_nothing_is_committed():
    log = _run([1], saves=())
    assert not any(line in ("save", "commit 0") for line in log)


@pytest.mark.parametrize("takes", [[0], [0, 0]])
def test_an_engine_is_synced_once_where_nothing_is_learnt(takes):
    assert sum(line.startswith("sync") for line in _run(takes)) == 1


def test_an_engine_that_lost_its_weights_gets_them_and_the_iteration_is_asked_for_again():
    assert _run([1, 1], loses=[1, 1], saves=(2,)) == [
        *("sync 0", "collect 0 at 0", "learn 4", "sync 1"),
        *("collect 1 at 1", "sync 1", "collect 1 at 1", "sync 1", "collect 1 at 1"),
        *("learn 4", "save", "commit 1"),
    ]


def test_a_signal_while_rollouts_are_collected_saves_what_is_learnt_and_ends():
    log = _run([1, 1, 1], never_ends=1, saves=(3,))
    assert log[-3:] == ["sync 1", "collect 1 at 1", "save now"]
