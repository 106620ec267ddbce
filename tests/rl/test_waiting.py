"""Ranks that wait on the store: real processes over gloo, killed and stopped."""

import json
import os
import signal
import time

import pytest
from torch.distributed import TCPStore

from megatron_k2.rl.waiting import EXIT_CODE
from tests.rl.waiting_worker import SILENT_SECONDS
from tests.support.distributed import end, start_ranks

pytestmark = pytest.mark.dist

MODULE = "tests.rl.waiting_worker"
NUM_RANKS = 3


class Ranks:
    """Three that wait; rank 0 holds the store, or this process does."""

    def __init__(self, folder, work="long", asked=None, has_store=False, stops=None):
        self._folder = folder / "logs"
        self._stores = [] if has_store else [_store()]
        case = folder / "case.json"
        case.write_text(json.dumps({"work": work, "asked": asked, "stops": stops}))
        self.all = start_ranks(MODULE, NUM_RANKS, [str(case)], self._folder, stores=self._stores)

    def log(self, rank):
        path = self._folder / f"rank{rank}.log"
        return path.read_text() if path.exists() else ""

    def last(self, rank):
        return self.log(rank).strip().splitlines()[-1]

    def wait_until_all_wait(self):
        deadline = time.monotonic() + 60
        words = {rank: "works" if rank == 0 else "waits" for rank in range(NUM_RANKS)}
        while not all(word in self.log(rank) for rank, word in words.items()):
            assert time.monotonic() < deadline, [self.log(rank) for rank in words]
            time.sleep(0.05)
        time.sleep(0.3)  # a few beats

    def seconds_to_end(self, ranks):
        begin = time.monotonic()
        while any(self.all[rank].poll() is None for rank in ranks):
            assert time.monotonic() - begin < 60, [self.log(rank) for rank in ranks]
            time.sleep(0.02)
        return time.monotonic() - begin


@pytest.fixture
def ranks(tmp_path):
    started = []

    def start(*args, **more):
        started.append(Ranks(tmp_path, *args, **more))
        return started[-1]

    yield start
    for process in started[-1].all:
        end(process)


def _store():
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_all_get_what_rank_0_worked_for(ranks):
    found = ranks("short")
    found.seconds_to_end(range(NUM_RANKS))
    assert [found.last(rank) for rank in range(NUM_RANKS)] == ["found groups"] * NUM_RANKS


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_gives_no_sign_of_life_is_named_and_the_others_end(ranks, number):
    found = ranks()
    found.wait_until_all_wait()
    os.kill(found.all[2].pid, number)
    assert found.seconds_to_end([0, 1]) < SILENT_SECONDS + 10
    for rank in (0, 1):
        assert found.all[rank].poll() == EXIT_CODE
        last = found.last(rank)
        assert last.startswith("lost: waiting for rollouts: no sign of life from rank 2 (host ")
        assert f"pid {found.all[2].pid}) for {SILENT_SECONDS:g} s" in last
    assert "work was cancelled" in found.log(0)


def test_a_rank_that_is_stopped_when_the_work_is_done_is_not_waited_for_in_a_collective(ranks):
    found = ranks("short", stops=1)
    assert found.seconds_to_end([0, 2]) < 60
    for rank in (0, 2):
        assert found.all[rank].poll() == EXIT_CODE
        assert "lost: waiting for rollouts: no sign of life from rank 1 (host " in found.last(rank)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("has_store", [True, False])
def test_rank_0_is_missed_whether_or_not_it_holds_the_store(ranks, number, has_store):
    found = ranks(has_store=has_store)
    found.wait_until_all_wait()
    os.kill(found.all[0].pid, number)
    assert found.seconds_to_end([1, 2]) < SILENT_SECONDS + 10
    for rank in (1, 2):
        assert found.all[rank].poll() == EXIT_CODE
        said = "no sign of life from rank 0" if not has_store else "the store in which the ranks"
        assert said in found.last(rank)


def test_what_rank_0_refuses_or_fails_at_ends_all(ranks):
    found = ranks("refuses")
    found.seconds_to_end(range(NUM_RANKS))
    said = "UserError: --tasks none: no such file"
    assert [found.last(rank) for rank in range(NUM_RANKS)] == [said] * NUM_RANKS
    found = ranks("fails")
    found.seconds_to_end(range(NUM_RANKS))
    assert found.last(0) == "RuntimeError: the controller has gone"
    said = "lost: waiting for rollouts: rank 0 failed: the controller has gone"
    assert [found.last(rank) for rank in (1, 2)] == [said] * 2


@pytest.mark.parametrize("asked", [0, 2])
def test_a_signal_at_any_rank_ends_the_wait_of_all(ranks, asked):
    found = ranks(asked=asked)
    assert found.seconds_to_end(range(NUM_RANKS)) < 60
    assert [found.last(rank) for rank in range(NUM_RANKS)] == ["EndAsked:"] * NUM_RANKS
    assert "work was cancelled" in found.log(0)
