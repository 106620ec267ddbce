"""A verifier that goes wrong is *unknown* in its time, and touches no other verdict."""

import asyncio
import time
from pathlib import Path

import pytest

from megatron_k2.errors import UserError
from megatron_k2.gym.checked import CheckedDomain
from megatron_k2.gym.protocol import Outcome, Task, Verdict
from megatron_k2.gym.workers import Deadline, Workers

VERIFY = "tests.gym.hostile_verifiers:verify"
DEADLINE = Deadline(cpu_seconds=0.5, wall_seconds=4)
FAILURES = {
    "raises": "ZeroDivisionError: division by zero",
    "exits": "its process ended",
    "dies": "its process ended",
    "is_killed": "its process ended",
    "spins": "more than 0.5 CPU seconds",
    "ignores_signals": "more than 0.5 CPU seconds",
    "sleeps": "more than 4 seconds",
    "forks": "it left processes behind",
    "returns_none": "the verifier returned None",
    "returns_a_number": "the verifier returned 1.0",
    "returns_an_object": "not JSON serializable",
    "takes_memory": "MemoryError",
}


def task(how: str) -> Task:
    return Task("hostile", "", {"how": how})


def judged(hows: list[str], num_workers: int, deadline: Deadline = DEADLINE) -> list[Verdict]:
    async def all_of_them() -> list[Verdict]:
        domain = CheckedDomain("hostile", VERIFY, num_workers=num_workers, deadline=deadline)
        try:
            runs = [domain.judge(task(how), str(n)) for n, how in enumerate(hows)]
            return await asyncio.gather(*runs)
        finally:
            await domain.close()

    return asyncio.run(all_of_them())


def test_every_failure_is_unknown_with_its_reason_and_frees_its_slot():
    """One slot: a verdict that follows a failure shows that the slot came back."""
    began = time.monotonic()
    hows = [how for failure in FAILURES for how in (failure, "echo")]
    found = judged(hows, num_workers=1)
    for number, how in enumerate(hows):
        verdict = found[number]
        if how == "echo":
            assert (verdict.outcome, verdict.evidence) == (Outcome.RIGHT, str(number))
        else:
            assert verdict.outcome is Outcome.UNKNOWN, how
            assert verdict.reward is None
            assert FAILURES[how] in verdict.evidence, how
    assert time.monotonic() - began < 60
    assert not _left_over()


def _left_over() -> list[str]:
    """Worker processes of ours, or copies of them, that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
            if b"megatron_k2.gym.worker" in words and parent == "1":
                found.append(entry.name)
    return found


def test_a_copy_that_comes_back_from_a_verifier_answers_nothing():
    found = judged(["forks_and_returns", "echo", "forks_and_returns", "echo"], num_workers=1)
    assert [found[1].evidence, found[3].evidence] == ["1", "3"]


def test_what_a_verifier_prints_is_no_answer():
    found = judged(["prints", "echo"] * 3, num_workers=2)
    assert [verdict.outcome for verdict in found] == [Outcome.RIGHT] * 6
    assert [found[n].evidence for n in (1, 3, 5)] == ["1", "3", "5"]


def test_honest_neighbours_in_a_hostile_mix_are_all_judged_right():
    """Twice as many workers as cores, hostile ones among them: the deadline is of CPU seconds."""
    hows = ["works", "spins", "works", "dies", "works", "forks", "works", "raises"] * 4
    found = judged(hows, num_workers=4, deadline=Deadline(cpu_seconds=1.0, wall_seconds=60))
    honest = [v.outcome for v, how in zip(found, hows, strict=True) if how == "works"]
    assert honest == [Outcome.RIGHT] * 16
    others = [v.outcome for v, how in zip(found, hows, strict=True) if how != "works"]
    assert set(others) == {Outcome.UNKNOWN}


def test_a_cancelled_verdict_ends_its_worker_and_frees_the_slot():
    async def cancelled() -> Verdict:
        domain = CheckedDomain("hostile", VERIFY, num_workers=1)
        running = asyncio.ensure_future(domain.judge(task("sleeps"), ""))
        await asyncio.sleep(0.5)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        try:
            return await asyncio.wait_for(domain.judge(task("echo"), "after"), 30)
        finally:
            await domain.close()

    assert asyncio.run(cancelled()).evidence == "after"


def test_deadlines_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="cpu_seconds=0: expected a positive number"):
        Deadline(cpu_seconds=0)
    assert Workers(3).num_workers == 3
