"""The work engine: the same bytes whatever the engine and the faults, nothing lost under kill -9.

Not exercised: a power cut, several machines on one file system.
"""

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from megatron_k2.errors import UserError
from megatron_k2.synthesis.store import BATCH, Store
from megatron_k2.synthesis.work.job import (
    STORE_FILE,
    Job,
    begin,
    item_of,
    shard_folder,
    shard_of,
)
from megatron_k2.synthesis.work.local import run_local, worker_command
from megatron_k2.synthesis.work.merge import counts_of
from megatron_k2.synthesis.work.worker import STOPPED
from tests.support.paths import REPOSITORY
from tests.synthesis.running import begun, merged, run, teacher

FAULTS = {"echo": True, "errors": 0.06, "busy": 0.04, "drop": 0.03}
QUICK = {"policy": {"backoff_seconds": 0.01, "most_backoff_seconds": 0.1}}
NUMBER = 300


@pytest.fixture(scope="module", autouse=True)
def _from_the_checkout():
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    yield
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def worker(folder, concurrency, *more):
    words, flags = worker_command(folder, concurrency)
    return [sys.executable, *words, "0", *flags, *more]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    with teacher(echo=True) as (url, _):
        return run(tmp_path_factory.mktemp("undisturbed"), url, NUMBER, concurrency=1)


@pytest.mark.parametrize(("concurrency", "num_shards"), [(32, 1), (1, 2), (32, 2)])
def test_output_hangs_on_neither_concurrency_nor_shards_nor_faults(
    tmp_path, undisturbed, concurrency, num_shards
):
    number = NUMBER
    with teacher(**FAULTS) as (url, counts):
        assert run(tmp_path, url, number, num_shards, concurrency, **QUICK) == undisturbed
        assert counts()["busy"] > 0
        assert counts()["repeated"] == 0
    assert undisturbed.count(b"\n") == number + 1


@pytest.mark.parametrize("share", [0.05, 0.4, 0.8], ids=["early", "midway", "late"])
def test_kill_minus_9_loses_nothing(tmp_path, undisturbed, share):
    concurrency = 16
    with teacher(**FAULTS, delay=0.02) as (url, counts):
        job = begun(tmp_path, url, NUMBER, **QUICK)
        command = worker(tmp_path, concurrency)
        process = subprocess.Popen(command)
        while counts().get("answered", 0) < share * NUMBER:
            time.sleep(0.005)
        process.kill()
        process.wait()
        assert counts()["answered"] < NUMBER, "it had ended before"
        assert run_local(tmp_path, job, concurrency)
        assert merged(tmp_path, job) == undisturbed
        assert counts()["repeated"] <= concurrency + BATCH


def test_a_storm_of_429_is_sat_out(tmp_path, undisturbed):
    with teacher(echo=True, storm_seconds=3.0) as (url, counts):
        policy = {"policy": {"backoff_seconds": 0.1, "most_backoff_seconds": 1.0}}
        assert run(tmp_path, url, NUMBER, **policy) == undisturbed
        assert counts()["busy"] > 100


@pytest.mark.slow
def test_half_a_minute_of_429_is_sat_out_with_the_policy_of_users(tmp_path, undisturbed):
    with teacher(echo=True, storm_seconds=30.0) as (url, counts):
        assert run(tmp_path, url, NUMBER) == undisturbed
        assert counts()["busy"] > 100


def test_a_signal_stops_gracefully_and_repeats_nothing(tmp_path, undisturbed):
    with teacher(echo=True, delay=0.02) as (url, counts):
        job = begun(tmp_path, url, NUMBER)
        command = worker(tmp_path, 8)
        process = subprocess.Popen(command)
        while counts().get("answered", 0) < 50:
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == STOPPED
        assert counts()["answered"] < NUMBER
        assert run_local(tmp_path, job, 8)
        assert counts()["repeated"] == 0
        assert merged(tmp_path, job) == undisturbed


def test_a_worker_ends_with_whoever_started_it(tmp_path):
    with teacher(echo=True, delay=0.05) as (url, counts):
        begun(tmp_path, url, NUMBER)
        command = worker(tmp_path, 4, "--watch-stdin")
        process = subprocess.Popen(command, stdin=subprocess.PIPE)
        while not counts().get("answered"):
            time.sleep(0.01)
        process.stdin.close()
        assert process.wait(20) == STOPPED


def test_the_same_command_right_after_a_kill_waits_for_what_is_still_being_answered(
    tmp_path, undisturbed
):
    """The workers outlive the run by the answers under way, here half a second."""
    with teacher(echo=True, delay=0.5) as (url, counts):
        job = begun(tmp_path, url, NUMBER, num_shards=2)
        code = "import sys; from pathlib import Path; from megatron_k2.synthesis.work import local"
        code += "\nfrom megatron_k2.synthesis.work.job import read_job\n"
        code += "local.run_local(Path(sys.argv[1]), read_job(Path(sys.argv[1])), 64)"
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
        while counts().get("answered", 0) < 64:
            time.sleep(0.005)
        process.kill()
        process.wait()
        assert run_local(tmp_path, job, 64)
        assert counts()["repeated"] == 0
        assert merged(tmp_path, job) == undisturbed


def test_a_shard_that_another_run_works_on_is_refused(tmp_path):
    with teacher(echo=True, delay=0.5) as (url, counts):
        job = begun(tmp_path, url, NUMBER)
        process = subprocess.Popen(worker(tmp_path, 4))
        while not counts().get("answered"):
            time.sleep(0.005)
        with pytest.raises(UserError, match=f"in use by another process.*pid {process.pid}"):
            run_local(tmp_path, job, 4)
        process.kill()
        process.wait()


@pytest.mark.parametrize("status", [401, 404])
def test_an_endpoint_that_refuses_ends_the_run_in_a_sentence(tmp_path, status):
    with teacher(echo=True, refuses=status) as (url, _):
        job = begun(tmp_path, url, 50)
        with pytest.raises(UserError, match=f"refuses.*status {status}: not here"):
            run_local(tmp_path, job, 8)
        assert counts_of(tmp_path, job)["items"] == 50


def test_a_request_that_is_refused_is_worked_on_again(tmp_path):
    with teacher(echo=True, refuses=400) as (url, _):
        job = begun(tmp_path, url, 20)
        assert run_local(tmp_path, job, 8)
        assert counts_of(tmp_path, job)["failed"] == 20
    with teacher(echo=True) as (url, _):
        job = begun(tmp_path, url, 20)
        assert run_local(tmp_path, job, 8)
        found = counts_of(tmp_path, job)
        assert found["kept"] + found["rejected"] == 20
        assert not found["failed"]


def test_an_endpoint_that_is_not_there_ends_the_run(tmp_path):
    few = {"policy": {"deadline_seconds": 0.3, "backoff_seconds": 0.05}}
    job = begun(tmp_path, "http://127.0.0.1:9", 100, **few)
    with pytest.raises(UserError, match="in a row had no answer"):
        run_local(tmp_path, job, 50)


def test_another_job_in_the_folder_is_refused(tmp_path):
    begin(tmp_path, Job("a:b", {"seed": 1}, 1))
    begin(tmp_path, Job("a:b", {"seed": 1}, 1, {"endpoint": "elsewhere"}))
    with pytest.raises(UserError, match="begun with seed '1', now '2'"):
        begin(tmp_path, Job("a:b", {"seed": 2}, 1))
    with pytest.raises(UserError, match="begun with shards"):
        begin(tmp_path, Job("a:b", {"seed": 1}, 2))


def test_what_is_committed_survives_a_full_disk(tmp_path):
    store = Store(tmp_path / STORE_FILE)
    store.keep_answer(b"first", {"choices": []}, "m", (1, 1))
    store.commit()
    pages = store._db.execute("pragma page_count").fetchone()[0]
    store._db.execute(f"pragma max_page_count={pages + 2}")

    def fill():
        for number in range(1000):
            store.keep_answer(str(number).encode(), {"text": "x" * 4000}, "m", (1, 1))

    with pytest.raises(UserError, match=r"full.*make room and run the same command again"):
        fill()
    with contextlib.suppress(UserError):
        store.close()
    again = Store(tmp_path / STORE_FILE)
    assert again.answer(b"first") == {"choices": []}
    again.keep_answer(b"more", {"choices": [1]}, "m", (1, 1))
    again.close()


def test_a_file_that_is_no_store(tmp_path):
    (tmp_path / STORE_FILE).write_text("not a database, " * 100)
    with pytest.raises(UserError, match="expected a shard's store"):
        Store(tmp_path / STORE_FILE)


def test_two_workers_are_never_in_one_shard(tmp_path):
    with teacher(echo=True, delay=0.05) as (url, counts):
        begun(tmp_path, url, NUMBER)
        command = worker(tmp_path, 4)
        first = subprocess.Popen(command)
        while not counts().get("answered"):
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)  # it must not end before the second has begun
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        first.kill()
        first.wait()
    assert second.returncode == 2
    assert "in use by another process" in second.stderr


def test_an_item_of_the_same_content_is_one(tmp_path):
    store = Store(tmp_path / STORE_FILE)
    one, other = item_of("a", {"text": "x", "number": 0}), item_of("b", {"number": 0, "text": "x"})
    assert store.add_item(one)
    assert not store.add_item(other)
    assert [each.source for each in store.items_left()] == ["a"]
    assert shard_of(one.hash, 1) == 0
    store.close()


def test_records_are_read_while_nobody_writes(tmp_path):
    path = tmp_path / STORE_FILE
    with contextlib.closing(Store(path)) as store:
        store.end_item(b"b", "kept", {"n": 2})
        store.end_item(b"a", "kept", {"n": 1})
    with contextlib.closing(Store(path, is_reader=True)) as store:
        assert [json.loads(text)["n"] for _, text in store.ended("kept")] == [1, 2]
        with pytest.raises(UserError):
            store.clear_items()
    assert sqlite3.connect(path).execute("select count(*) from ended").fetchone() == (2,)


def test_keys_are_nowhere(tmp_path, monkeypatch):
    from megatron_k2.engine.remote.client import Client
    from megatron_k2.engine.remote.endpoints import Endpoint
    from megatron_k2.synthesis.llm.model import Model

    monkeypatch.setenv("OWN_KEY", "sk-very-secret")
    with teacher(echo=True, errors=0.3) as (url, _):

        async def ask():
            store = Store(tmp_path / STORE_FILE)
            client = Client([Endpoint(url, key_env="OWN_KEY")])
            model = Model(client, "m", store)
            for number in range(10):
                await model.say([{"role": "user", "content": str(number)}], max_tokens=4, seed=0)
            await model.close()
            store.close()

        asyncio.run(ask())
    for path in tmp_path.iterdir():
        assert b"very-secret" not in path.read_bytes()


def test_shards_folders_are_made_by_number(tmp_path):
    assert shard_folder(tmp_path, 7).name == "0007"


def test_a_store_that_was_removed_is_seen(tmp_path):
    with teacher(echo=True) as (url, _):
        job = begun(tmp_path, url, 40, num_shards=2)
        assert run_local(tmp_path, job, 8)
        (shard_folder(tmp_path, 1) / STORE_FILE).unlink()
        assert run_local(tmp_path, job, 8)
        with pytest.raises(UserError, match=r"of 40 items.*remove items.json"):
            counts_of(tmp_path, job)
        (tmp_path / "items.json").unlink()
        job = begun(tmp_path, url, 40, num_shards=2)
        assert run_local(tmp_path, job, 8)
        assert merged(tmp_path, job).count(b"\n") == 41


def test_a_worker_that_dies_is_named_and_the_rest_is_kept(tmp_path, monkeypatch):
    job = begun(tmp_path, "http://127.0.0.1:9", 5)
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(UserError, match=r"shard 0 was ended with code 1; .*worker.log"):
        run_local(tmp_path, job, 8)


def test_a_worker_does_without_torch():
    program = "import sys, megatron_k2.synthesis.work.worker; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
