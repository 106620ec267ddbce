"""A whole run as a cluster has it, on this machine: supervisors, engines, controller, four ranks.

``Cluster`` is one start of it; ``local`` the same run with the embedded engine, to compare with.
Ranks are forked from the tests' template where one is at hand, the other processes are started.
"""

import contextlib
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time

from megatron_k2.rl.cluster.rendezvous import Meeting
from megatron_k2.rl.flags import expand
from megatron_k2.rl.journal_reader import JournalReader
from megatron_k2.rl.side import FOLDER, LEDGER
from megatron_k2.rl.synthetic import prepare
from megatron_k2.run.flags import read_flags
from tests.support.distributed import end, start_ranks
from tests.support.paths import REPOSITORY

HOST = "127.0.0.1"
NUM_RANKS = 4
NUM_ENGINES = 2
MODEL = {
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_layers": 3,
    "num_moe_experts": 8,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "max_position_embeddings": 128,
    "yarn": None,
}
"""As ``FLAGS`` say it: engines must compute just what the trainer does."""
FLAGS = shlex.split("""
    --preset k2-tiny --hidden-size 64 --ffn-hidden-size 96 --num-layers 3
    --moe-layer-freq ([0]*1+[1]*2) --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 32
    --moe-shared-expert-intermediate-size 32 --qk-clip-threshold 0.1
    --seq-length 128 --max-position-embeddings 128 --synthetic-data --batch-invariant
    --tensor-model-parallel-size 2 --sequence-parallel
    --prompts-per-iteration 4 --group-size 4 --groups-in-play 6 --engine-slots 6
    --max-decode-steps 80 --eval-every 2 --rail truncated=off --lr 2e-3 --min-lr 2e-3
    --lr-warmup-iters 0 --seed 7 --save-interval 1 --exit-signal-handler
""")
PATIENCE = {"look": 0.2, "silent": 8.0, "start": 120, "backoff": 0.1, "most_backoff": 1, "end": 3}


def flags(folder, iterations, *more, of=FLAGS):
    """Of a run in a folder; tasks and tokenizer are made there, unless they are."""
    data = ["--tasks", str(folder / "data/letters.json")]
    data += ["--chat-tokenizer", str(folder / "data/tokenizer")]
    whole = [*of, *data, "--save", str(folder / "out"), "--iterations", str(iterations)]
    return [*whole, *more]


def start_trainer(words, log_dir):
    """Four ranks of ``rl/train.py``."""
    return start_ranks("megatron_k2.rl.train", NUM_RANKS, words, log_dir)


def wait_all(processes, seconds=300.0):
    """Exit codes, once all have ended."""
    deadline = time.monotonic() + seconds
    while any(each.poll() is None for each in processes):
        if time.monotonic() > deadline:
            raise AssertionError("they did not end")
        time.sleep(0.05)
    return [each.poll() for each in processes]


def local(folder, iterations):
    """The run with the embedded engine, to its end."""
    ranks = start_trainer(flags(folder, iterations), folder / "logs")
    try:
        codes = wait_all(ranks)
        assert codes == [0] * NUM_RANKS, tail(folder / "logs" / "rank0.log") + tail(
            folder / "out/logs/rank0.log"
        )
    finally:
        for rank in ranks:
            end(rank)


def tail(path, size=3000):
    """The end of a log."""
    return f"\n--- {path}:\n" + (path.read_text()[-size:] if path.exists() else "(absent)")


class Cluster:
    """One start of a run; ``with`` ends whatever is left of it.

    Args:
        folder: of the run.
        iterations: of it.
        start: how often it was started before.
        gyms: services, none: the controller plays episodes itself.
        of: flags of the run.
        engines: what the file of engines says otherwise.
    """

    def __init__(self, folder, iterations, start=0, gyms=0, of=FLAGS, engines=None):
        self.folder, self.iterations, self.gyms = folder, iterations, gyms
        self._other = engines or {}
        self._num_engines = self._other.get("replicas", NUM_ENGINES)
        job = hashlib.sha256(str(folder).encode()).hexdigest()[:8]  # engines' folders go by it
        self.meeting = Meeting(folder / "out" / "rl" / "rendezvous" / f"{job}.{start}")
        self.logs = folder / f"logs.{start}"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.engines = folder / "engines.json"
        meet = ["--meet", str(self.meeting.directory), "--engines", str(self.engines)]
        meet += ["--host", HOST, "--gym", str(gyms)]
        self.words = flags(folder, iterations, *meet, of=of)
        self.processes, self.ranks = {}, []

    def __enter__(self):
        self._write_engines()
        for node in range(self._num_engines):
            self.start(f"supervisor.{node}")
        for number in range(self.gyms):
            self.start(f"gym.{number}")
        self.start("controller")
        self.ranks = start_trainer(self.words, self.logs)
        return self

    def _write_engines(self):
        prepare(read_flags(expand(self.words, cuda=False)))  # engines read the tokenizer
        tokenizer = str(self.folder / "data/tokenizer")
        options = {"num_slots": 6, "max_length": 128, "batch_invariant": True, "dtype": "float32"}
        row = {
            "backend": "local",
            "replicas": NUM_ENGINES,
            "model": {"preset": "k2-tiny", "tokenizer": tokenizer, **MODEL},
            "options": options,
            "patience": PATIENCE,
        }
        self.engines.write_text(json.dumps(row | self._other))

    def start(self, name):
        """A process that is no rank, by its name."""
        kind, _, number = name.partition(".")
        meet = ["--meet", str(self.meeting.directory), "--host", HOST]
        words = {
            "supervisor": ["--engines", str(self.engines), "--node", number],
            "gym": ["--tasks", str(self.folder / "data/letters.json")],
        }.get(kind, self.words)
        if kind == "supervisor":
            words = [*meet, *words, "--nodes", str(self._num_engines)]
        if kind == "gym":
            words = [*meet, *words, "--index", number]
        module = {"gym": "gym_service"}.get(kind, kind)
        log = (self.logs / f"{name}.log").open("ab")
        self.processes[name] = subprocess.Popen(
            [sys.executable, "-m", f"megatron_k2.rl.cluster.{module}", *words],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def records(self):
        """Of the ledger, as far as it is written."""
        reader = JournalReader(self.folder / "out" / FOLDER / LEDGER)
        return [record for _, record in reader.records()]

    def pid(self, name):
        """Of a process, also of an engine or a rank."""
        kind, _, number = name.partition(".")
        if kind == "rank":
            return self.ranks[int(number)].pid
        if kind == "engine":
            return self.meeting.read("engine", int(number)).details["pid"]
        return self.processes[name].pid

    def send(self, name, number):
        """A signal to one process."""
        os.kill(self.pid(name), number)

    def wait(self, seconds=300.0):
        """Exit codes of the ranks, once all have ended."""
        return wait_all(self.ranks, seconds)

    def told(self):
        """The ends of all logs, for a test that failed."""
        own = sorted(self.logs.glob("*.log")) + sorted((self.folder / "out/logs").glob("*.log"))
        engines = sorted((self.meeting.directory / "logs").glob("*.log"))
        return "".join(map(tail, [*own, *engines]))

    def __exit__(self, *_error):
        for rank in self.ranks:
            end(rank)
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
