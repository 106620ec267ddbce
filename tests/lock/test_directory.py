"""One writer in a directory: who is refused, who takes over from the dead, and after how long.

Other machines are other values in the lock file. Not exercised: NFS itself, whose ``link`` and
open-to-close times are relied on.
"""

import errno
import json
import os
import signal
import socket
import threading
import time
from dataclasses import asdict, replace

import pytest

from megatron_k2.cli.main import main
from megatron_k2.errors import UserError
from megatron_k2.lock import directory
from megatron_k2.lock.directory import (
    BEAT_SECONDS,
    HANDED_OVER,
    LOCK_FILE,
    STALE_SECONDS,
    Owner,
    hold,
)

JOB, RESTARTS = "SLURM_JOB_ID", "SLURM_RESTART_COUNT"


@pytest.fixture(autouse=True)
def _no_job(monkeypatch):
    monkeypatch.delenv(JOB, raising=False)
    monkeypatch.delenv(RESTARTS, raising=False)
    monkeypatch.delenv(HANDED_OVER, raising=False)


def _forked(act):
    """``act()`` in a fork of this process; its number."""
    child = os.fork()
    if child == 0:
        try:
            act()
            os._exit(0)
        except UserError:
            os._exit(2)
        except BaseException:
            os._exit(1)
    return child


def _holder(path, *, is_beside=False):
    """A process that holds ``path`` until it is killed; its number, once it holds."""

    def act():
        with hold(path, "a run", is_beside=is_beside):
            signal.pause()

    child = _forked(act)
    lock = path.with_name(f"{path.name}{LOCK_FILE}") if is_beside else path / LOCK_FILE
    _until(lock.exists)
    return child


def _until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _owner(path):
    return Owner(**json.loads((path / LOCK_FILE).read_text()))


def _left_elsewhere(path, *, silent_seconds, job=None):
    """The lock of a process on another machine, which beat that long ago."""
    owner = replace(directory._this_process("a run"), host="node-7", pid=4321, place="b", job=job)
    path.mkdir(parents=True, exist_ok=True)
    (path / LOCK_FILE).write_text(json.dumps(asdict(owner)))
    beat = time.time() - silent_seconds
    os.utime(path / LOCK_FILE, (beat, beat))
    return owner


def test_the_second_is_refused_with_directory_host_and_process(tmp_path):
    child = _holder(tmp_path / "run")
    said = rf"{tmp_path}/run is in use.*a run on host {socket.gethostname()}, pid {child},"
    with pytest.raises(UserError, match=said), hold(tmp_path / "run", "a run"):
        pass
    os.kill(child, signal.SIGKILL)
    _until(lambda: directory._start_of(child) is None)
    with hold(tmp_path / "run", "a run"):  # at once, a zombie as it still is
        assert _owner(tmp_path / "run").pid == os.getpid()
    _code(child)
    assert not list((tmp_path / "run").iterdir())


def test_a_second_run_in_one_save_directory_ends_with_code_two(tmp_path, capsys):
    child = _holder(tmp_path)
    command = ["pretrain", "--preset", "k2-tiny", "--mock-data", "--save", str(tmp_path)]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in (str(tmp_path), socket.gethostname(), f"pid {child}"))
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
    os.kill(child, signal.SIGKILL)
    _code(child)


@pytest.mark.parametrize("verb", ["import", "export"])
def test_a_second_conversion_to_one_target_ends_with_code_two(tmp_path, capsys, verb):
    target = tmp_path / "target"
    child = _holder(target, is_beside=True)
    assert main(["convert", verb, str(tmp_path / "source"), str(target)]) == 2
    said = capsys.readouterr().err
    assert f"{target} is in use by another process: a run on host" in said
    assert f"pid {child}" in said
    assert [path.name for path in tmp_path.iterdir()] == [f"target{LOCK_FILE}"]
    os.kill(child, signal.SIGKILL)
    _code(child)
    assert main(["convert", verb, str(tmp_path / "source"), str(target)]) == 2
    assert "in use" not in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_process_number_that_is_used_again_is_not_the_owner(tmp_path):
    earlier = replace(directory._this_process("a run"), started="1")
    (tmp_path / LOCK_FILE).write_text(json.dumps(asdict(earlier)))
    with hold(tmp_path, "a run"):
        pass


def test_a_silent_owner_elsewhere_is_dead_within_a_minute_and_not_before_its_beats_are_late(
    tmp_path,
):
    assert 3 * BEAT_SECONDS < STALE_SECONDS < 60
    for silent_seconds in (0, BEAT_SECONDS, STALE_SECONDS - 5):
        _left_elsewhere(tmp_path, silent_seconds=silent_seconds)
        with pytest.raises(UserError, match=r"host node-7, pid 4321"), hold(tmp_path, "a run"):
            pass
    _left_elsewhere(tmp_path, silent_seconds=STALE_SECONDS + 1)
    with hold(tmp_path, "a run"):
        assert _owner(tmp_path).pid == os.getpid()


def test_a_job_queued_again_on_another_node_takes_its_own_lock_over_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv(JOB, "77")
    _left_elsewhere(tmp_path, silent_seconds=1, job="76")
    with pytest.raises(UserError, match="node-7"), hold(tmp_path, "a run"):
        pass
    _left_elsewhere(tmp_path, silent_seconds=1, job="77")
    monkeypatch.setenv(RESTARTS, "1")
    with hold(tmp_path, "a run"):
        assert _owner(tmp_path).pid == os.getpid()
        assert _owner(tmp_path).restarts == 1
    child = _holder(tmp_path)  # a second step of the job, here: it is alive, that is known
    with pytest.raises(UserError, match=f"pid {child}"), hold(tmp_path, "a run"):
        pass
    os.kill(child, signal.SIGKILL)
    _code(child)


@pytest.mark.parametrize("restarts", ["0", "2"])
def test_a_step_of_the_same_start_on_another_node_is_alive_until_it_is_silent(
    tmp_path, monkeypatch, restarts
):
    """Two steps of one allocation, or a later one after the first was killed."""
    monkeypatch.setenv(JOB, "77")
    monkeypatch.setenv(RESTARTS, restarts)
    monkeypatch.setattr(directory, "_SIGN_SECONDS", 0.05)
    _left_elsewhere(tmp_path, silent_seconds=STALE_SECONDS - 30, job="77")
    beating = threading.Timer(0.2, os.utime, [tmp_path / LOCK_FILE])
    beating.start()
    with pytest.raises(UserError, match=r"in use.*host node-7"), hold(tmp_path, "a run"):
        pass
    beating.join()
    _left_elsewhere(tmp_path, silent_seconds=STALE_SECONDS - 0.5, job="77")
    with hold(tmp_path, "a run"):
        assert _owner(tmp_path).pid == os.getpid()


@pytest.mark.parametrize("has_links", [True, False])
def test_of_many_that_find_a_dead_owner_one_takes_over(tmp_path, monkeypatch, has_links):
    if not has_links:

        def link(source, target):
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(directory, "_start_keeper", lambda path, owner: _NoKeeper())
    _left_elsewhere(tmp_path, silent_seconds=STALE_SECONDS + 1)
    (tmp_path / "go").mkdir()

    def act():
        _until(lambda: (tmp_path / "go" / "now").exists())
        with hold(tmp_path, "a run"):
            time.sleep(1.0)

    children = [_forked(act) for _ in range(12)]
    (tmp_path / "go" / "now").touch()
    codes = sorted(_code(child) for child in children)
    assert codes == [0] + 11 * [2]
    assert [path.name for path in tmp_path.iterdir()] == ["go"]


class _NoKeeper:
    def kill(self):
        pass

    def wait(self):
        pass


def test_a_damaged_lock_is_somebodys_until_it_is_old(tmp_path):
    (tmp_path / LOCK_FILE).write_text("{")
    with pytest.raises(UserError, match="a damaged lock"), hold(tmp_path, "a run"):
        pass
    beat = time.time() - STALE_SECONDS - 1
    os.utime(tmp_path / LOCK_FILE, (beat, beat))
    with hold(tmp_path, "a run"):
        pass


def test_a_child_makes_its_parents_lock_its_own_and_gives_it_back(tmp_path):
    with hold(tmp_path, "a run") as held:
        for _ in range(2):

            def act():
                with held.handed_over(), hold(tmp_path, "a run"):
                    os._exit(0 if _owner(tmp_path).pid == os.getpid() else 1)

            child = _forked(act)  # ends as if killed: its parent holds again, or still
            assert _code(child) == 0

        def well():
            with held.handed_over(), hold(tmp_path, "a run"):
                pass

        assert _code(_forked(well)) == 0
        assert _owner(tmp_path).pid == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_parent_that_is_killed_leaves_the_lock_with_its_child(tmp_path):
    def parent():
        with hold(tmp_path, "a run") as held, held.handed_over():
            _forked(child)
            signal.pause()

    def child():
        with hold(tmp_path, "a run"):
            time.sleep(60)

    first = _forked(parent)
    _until(lambda: (tmp_path / LOCK_FILE).exists() and _owner(tmp_path).pid != first)
    second = _owner(tmp_path).pid
    os.kill(first, signal.SIGKILL)
    _code(first)
    with pytest.raises(UserError, match=f"pid {second}"), hold(tmp_path, "a run"):
        pass
    os.kill(second, signal.SIGKILL)


def test_the_keeper_gives_signs_of_life_and_ends_an_owner_whose_lock_is_anothers(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(directory, "BEAT_SECONDS", 0.1)
    child = _holder(tmp_path)
    lock = tmp_path / LOCK_FILE
    os.utime(lock, (1, 1))
    _until(lambda: lock.stat().st_mtime > 1)
    (tmp_path / "other").write_text("{}")
    (tmp_path / "other").replace(lock)
    assert _code(child) == -signal.SIGKILL


def test_what_cannot_be_a_directory_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="file/run cannot be written"),
        hold(tmp_path / "file" / "run", "a run"),
    ):
        pass
