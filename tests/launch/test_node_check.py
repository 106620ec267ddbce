"""The check before the first step: on two ranks as it runs, and what it says of nodes by hand."""

import signal
import socket
import time

import pytest

from megatron_k2.launch.group_check import slow_groups
from megatron_k2.launch.node_check import NodeFacts, existing_parent, verdict
from tests.support.distributed import BACKENDS, end, start_ranks

HOST = socket.gethostname()
FLAGS = "--preset k2-tiny --seq-length 64 --micro-batch-size 1 --global-batch-size 2".split()
LAYOUT = "--expert-model-parallel-size 2".split()


def _wanted(ranks=2, gigabytes=0.0):
    return ["--ranks", str(ranks), "--gpus", "0", "--checkpoint-gb", str(gigabytes)]


def _code(rank, seconds=120):
    deadline = time.monotonic() + seconds
    while rank.poll() is None:
        assert time.monotonic() < deadline, "a rank does not end"
        time.sleep(0.05)
    return rank.returncode


def _checked(arguments, log_dir, backend):
    """(exit codes, rank 0's words) of two ranks."""
    ranks = start_ranks("megatron_k2.launch.node_check", 2, arguments, log_dir, backend)
    try:
        codes = [_code(rank) for rank in ranks]
    finally:
        for rank in ranks:
            end(rank)
    return codes, (log_dir / "rank0.log").read_text()


@pytest.mark.dist
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_ranks_agree_and_time_the_groups_they_have(backend, tmp_path):
    save = ["--save", str(tmp_path / "not" / "yet")]
    codes, words = _checked([*_wanted(), *FLAGS, *LAYOUT, *save], tmp_path / "logs", backend)
    assert codes == [0, 0], words
    assert "2 ranks agree" in words
    kinds = [line.split(":")[0].strip() for line in words.splitlines() if "ms a sum" in line]
    assert kinds == ["dp", "ep"]
    assert not (tmp_path / "not").exists()


@pytest.mark.dist
def test_another_number_of_ranks_and_a_full_disk_are_named_with_host_and_rank(tmp_path):
    arguments = [*_wanted(ranks=16, gigabytes=1e9), *FLAGS, "--save", str(tmp_path)]
    codes, words = _checked(arguments, tmp_path / "logs", "gloo")
    assert codes == [1, 1]
    for rank in (0, 1):
        assert f"{HOST}, rank {rank}: 2 ranks were started, the recipe has 16" in words
    assert "GB free, one checkpoint is 1,000,000,000.0 GB" in words


@pytest.mark.dist
def test_a_rank_that_does_not_come_is_named(tmp_path):
    arguments = [*_wanted(), "--seconds", "3", *FLAGS]
    ranks = start_ranks("megatron_k2.launch.node_check", 2, arguments, tmp_path / "logs")
    ranks[1].send_signal(signal.SIGKILL)
    try:
        assert _code(ranks[0]) == 1
    finally:
        for rank in ranks:
            end(rank)
    words = (tmp_path / "logs" / "rank0.log").read_text()
    assert f"{HOST}, rank 0: rank 1 has not come to 127.0.0.1:" in words


def test_a_node_with_another_version_is_named():
    good = NodeFacts(0, "n1", {"torch": "2.14.1"}, [])
    assert verdict([good, NodeFacts(1, "n1", {"torch": "2.14.1"}, [])]) == ""
    old = NodeFacts(2, "n7", {"torch": "2.9.0"}, [])
    assert verdict([good, old]) == "n7, rank 2: torch 2.9.0, but 2.14.1 on n1"


def test_a_group_that_is_slower_than_its_kind_is_named():
    timed = [("n1", {"dp": 0.010, "ep": 0.002}), ("n2", {"dp": 0.011, "ep": 0.002})]
    timed += [("n3", {"dp": 0.010, "ep": 0.009})]
    dp, ep = slow_groups(timed).splitlines()
    assert dp.endswith("slowest 11.00 ms")
    assert ep.endswith("2.00 ms a sum of 16 MB, slowest 9.00 ms: n3, rank 2")


def test_a_directory_that_is_not_there_yet_is_on_its_parents_disk(tmp_path):
    assert existing_parent(tmp_path / "a" / "b") == tmp_path
    assert existing_parent(tmp_path) == tmp_path
