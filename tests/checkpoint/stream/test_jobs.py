"""Jobs: what overlaps, and what a disk or a dying worker makes of them."""

import errno
import os
import signal
import threading

import pytest

from megatron_k2.checkpoint.stream import jobs as room
from megatron_k2.checkpoint.stream.jobs import Job, JobDirectory, run_jobs
from megatron_k2.checkpoint.stream.output_file import OutputFile
from megatron_k2.errors import UserError

JOBS = [Job(f"{name}.bin", 3, name) for name in "abc"]


def write(file, job):
    file.write(job.payload.encode() * job.num_bytes)
    return {"letter": job.payload}


def run(tmp_path, work=write, num_workers=1, progress=lambda done, total: None):
    job_directory = JobDirectory(tmp_path / "out", {"job": 1})
    return run_jobs(job_directory, JOBS, work, num_workers, progress)


def partial(tmp_path):
    return sorted(path.name for path in (tmp_path / "out.partial").iterdir())


def test_a_job_is_written_while_the_one_before_goes_to_the_disk(tmp_path, monkeypatch):
    second_begins = threading.Event()
    real = OutputFile.sync

    def slow_sync(file):
        assert file.name.name[0] != "a" or second_begins.wait(10)
        real(file)

    def work(file, job):
        if job.payload == "b":
            assert partial(tmp_path) == [file_of("a"), file_of("b")]
            second_begins.set()
        return write(file, job)

    def file_of(letter):
        return f"{letter}.bin.{os.getpid()}.tmp"  # not its final name before it is on the disk

    monkeypatch.setattr(OutputFile, "sync", slow_sync)
    receipts = run(tmp_path, work)
    assert [receipt["letter"] for receipt in receipts] == ["a", "b", "c"]
    assert [receipt["num_bytes"] for receipt in receipts] == [3, 3, 3]
    assert partial(tmp_path) == ["a.bin", "b.bin", "c.bin"]


def test_what_the_disk_reports_afterwards_names_the_file_and_keeps_the_others(
    tmp_path, monkeypatch
):
    real = os.fsync

    def broken_for_b(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").find("/b.bin") > 0:
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", broken_for_b)
        with pytest.raises(UserError, match=r"out.partial/b.bin: the disk fails .Input/output"):
            run(tmp_path)
    assert "a.bin" in partial(tmp_path)
    assert "b.bin" not in partial(tmp_path)
    written = []
    run(tmp_path, lambda file, job: written.append(job.payload) or write(file, job))
    assert written[0] == "b"
    assert "a" not in written
    assert partial(tmp_path) == ["a.bin", "b.bin", "c.bin"]


def die_at_b(file, job):
    if job.payload == "b":
        os.kill(os.getpid(), signal.SIGKILL)
    return write(file, job)


def test_a_worker_that_is_killed_is_no_traceback(tmp_path):
    with pytest.raises(UserError, match=r"a worker was killed.*run the same command again"):
        run(tmp_path, die_at_b, num_workers=2)
    run(tmp_path, num_workers=2)
    assert partial(tmp_path) == ["a.bin", "b.bin", "c.bin"]


def test_a_result_that_was_killed_while_it_got_its_name_is_not_done_again(tmp_path, monkeypatch):
    run(tmp_path)
    job_directory = JobDirectory(tmp_path / "out", {"job": 1})
    (tmp_path / "out.partial" / ".config.json.17.partial").write_text("of a killed run")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(room, "sync_directory", killed)
        with pytest.raises(KeyboardInterrupt):
            job_directory.publish()
    run(tmp_path, die_at_b)  # nothing is left to do
    job_directory.publish()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    files = [room.FINISHED, "a.bin", "b.bin", "c.bin"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files


def test_a_result_that_was_whole_when_it_was_killed_is_known_for_what_it_is(tmp_path, monkeypatch):
    run(tmp_path)
    job_directory = JobDirectory(tmp_path / "out", {"job": 1})
    with monkeypatch.context() as patched:
        patched.setattr(room.shutil, "rmtree", lambda *_: None)  # killed before it
        job_directory.publish()
    before = (tmp_path / "out" / "a.bin").stat()
    with pytest.raises(room.FinishedError, match="out exists already, whole: this very conversion"):
        JobDirectory(tmp_path / "out", {"job": 1}, num_bytes=1 << 60)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a.bin").stat() == before
    with pytest.raises(UserError, match="exists already; remove it") as other:
        JobDirectory(tmp_path / "out", {"job": 2})
    assert not isinstance(other.value, room.FinishedError)


@pytest.mark.parametrize("is_file", [True, False], ids=["a file", "read only"])
def test_a_place_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch, is_file):
    parent = tmp_path / "parent"
    parent.write_text("") if is_file else parent.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match="parent is not a directory that can be written to"):
        room.require_space(parent / "out", 1)
