"""A run over processes of its own whose processes are killed and stopped, each in each phase.

    python tests/campaigns/rl_cluster_faults.py                  # all, half an hour on two cores
    python tests/campaigns/rl_cluster_faults.py --only engine    # rows whose name begins so

Two supervisors with an engine each, a gym service, a controller, four ranks: three iterations on
``k2-tiny``. The run goes once with the embedded engine in one program, undisturbed. Then, row by
row, one process gets a signal while iteration 1 is collected (its rollouts have begun), trained on
(they are in the ledger) or its weights are sent (a bucket lies in its node's folder). Rollouts in
which an engine gets it go on until it has been given weights in their midst. A supervisor or a gym
service is started again, as the job's script does; where a rank or the controller died, all else is
ended, and the job starts again with a new generation.

Each row must end with what the undisturbed run trained on, answer by answer and reward by reward,
its figures, and the bits of its last checkpoint. Not exercised: nodes that are other machines.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

from megatron_k2.rl.cluster.rendezvous import Address
from megatron_k2.rl.waiting import EXIT_CODE
from tests.campaigns.rl_sigkill import differ
from tests.rl.cluster.running import NUM_RANKS, Cluster, local, wait_all

ITERATIONS = 3
PHASES = ("collect", "train", "update")
STALE = "stale files"
"""No process: what another start of the job left in the folder in which this one meets."""
TRAIN_SECONDS = 0.3
"""From the record of an iteration to its first pass over it."""
AGAIN_SECONDS = 0.5
"""That a script takes to start a step's program again."""
MOST_SECONDS = 120.0
"""For ranks to end once one of theirs, or the controller, has gone."""


class Fault(NamedTuple):
    """What happens to whom, when."""

    name: str
    """Of a process of ``Cluster``."""
    signal: signal.Signals
    phase: str

    def __str__(self) -> str:
        return f"{self.name:<13} {self.signal.name:<8} {self.phase:<8}"


def faults():
    """All rows."""
    killed = ("engine.0", "supervisor.0", "gym.0", "controller", "rank.0", "rank.1")
    rows = [Fault(name, signal.SIGKILL, phase) for name in killed for phase in PHASES]
    rows += [Fault("engine.0", signal.SIGSTOP, phase) for phase in PHASES]
    rows += [Fault("rank.1", signal.SIGSTOP, "collect"), Fault(STALE, signal.SIGCONT, "start")]
    return rows + [Fault("all ranks", signal.SIGTERM, phase) for phase in PHASES]


def wait_for(run, phase, iteration=1, seconds=300.0):
    """Until the run is in that phase of an iteration."""
    buckets = f"megatron-k2.*.{run.meeting.generation}.node.0/*.safetensors"

    def is_there():
        if phase == "update":
            return has("iteration") and any(Path("/dev/shm").glob(buckets))
        if phase == "train":
            return has("iteration")
        return has("begin") and sum(r["kind"] == "answer" for r in run.records()) > asked

    def has(kind):
        return any(r["kind"] == kind and r["iteration"] == iteration for r in run.records())

    deadline, asked = time.monotonic() + seconds, 0
    if phase == "collect":
        wait_for(run, "train", iteration - 1)
        asked = sum(r["kind"] == "answer" for r in run.records())
    while not is_there():
        assert time.monotonic() < deadline, run.told()
        assert all(rank.poll() is None for rank in run.ranks), run.told()
        time.sleep(0.0005 if phase == "update" else 0.01)
    if phase == "train":
        time.sleep(TRAIN_SECONDS)


def leave_stale_files(there):
    """Addresses of another start, at which nobody listens."""
    for kind, index in (("controller", 0), ("engine", 0), ("gym", 0)):
        old = Address("job.9", kind, index, "127.0.0.1", 9, 1, 0)
        (there / f"{kind}.{index}.json").write_text(json.dumps(asdict(old)))


def signal_while_held(run, name, number, seconds=120.0):
    """Send an engine a signal while no rollout can end, until it has been given weights again.

    The gym service, which is stopped meanwhile, holds every episode.
    """
    run.send("gym.0", signal.SIGSTOP)
    try:
        run.send(name, number)
        deadline = time.monotonic() + seconds
        while "weights of version" not in (run.logs / "controller.log").read_text():
            assert time.monotonic() < deadline, run.told()
            time.sleep(0.05)
    finally:
        run.send("gym.0", signal.SIGCONT)


def disturb(run, fault):
    """Send the signal in its phase; start again what a script would."""
    wait_for(run, fault.phase)
    if fault.name.startswith("engine") and fault.phase == "collect":
        signal_while_held(run, fault.name, fault.signal)
        return
    if fault.name == "all ranks":
        for number in range(NUM_RANKS):
            run.send(f"rank.{number}", fault.signal)
        return
    run.send(fault.name, fault.signal)
    if fault.name.startswith(("supervisor", "gym")):
        time.sleep(AGAIN_SECONDS)
        run.start(fault.name)


def sentence(run):
    """What the ranks that were left said at their end."""
    for log in sorted((run.folder / "out" / "logs").glob("rank*.log")):
        lines = log.read_text(errors="replace").splitlines()
        if found := [line for line in lines if line.startswith("waiting for ")]:
            return found[-1]
    return ""


def row(fault, folder, alone):
    """One fault; how it ended, and whether anything is other than undisturbed: "" if nothing."""
    begin, said = time.monotonic(), []
    run = Cluster(folder, ITERATIONS, gyms=1)
    if fault.name == STALE:
        leave_stale_files(run.meeting.directory)
    with run:
        if fault.name != STALE:
            disturb(run, fault)
        sent = time.monotonic()
        is_stopped = fault.name.startswith("rank") and fault.signal is signal.SIGSTOP
        if is_stopped:  # srun kills it when the others have ended
            stopped = int(fault.name.partition(".")[2])
            wait_all([rank for n, rank in enumerate(run.ranks) if n != stopped], MOST_SECONDS)
            run.send(fault.name, signal.SIGKILL)
        codes = run.wait(MOST_SECONDS + 60)
        seconds = time.monotonic() - sent
        log = (run.logs / "controller.log").read_text()
        given = log.count("weights of version")
        said.append(f"ranks ended with {sorted(set(codes))} after {seconds:.0f} s")
        if given:
            said.append(f"{given} rounds of weights during rollouts")
        if text := sentence(run):
            said.append(text)
    if fault.name in ("controller", "rank.0", "rank.1", "all ranks"):
        is_asked = fault.signal is signal.SIGTERM
        if is_asked and codes != [0] * NUM_RANKS:
            return said, f"asked to end, they ended with {codes}: {run.told()}"
        if not is_asked and (0 in codes or not set(codes) <= {-9, 1, EXIT_CODE}):
            return said, f"expected ends with {EXIT_CODE} or an error, found {codes}: {run.told()}"
        with Cluster(folder, ITERATIONS, start=1, gyms=1) as run:
            codes = run.wait()
        said.append("started again")
    if codes != [0] * NUM_RANKS:
        return said, f"exit codes {codes}: {run.told()}"
    said.append(f"{time.monotonic() - begin:.0f} s in all")
    return said, differ(folder / "out", alone / "out")


def campaign(rows, root):
    """All rows; what differed, a line each."""
    alone = root / "alone"
    alone.mkdir()
    local(alone, ITERATIONS)
    lost = []
    for number, fault in enumerate(rows):
        folder = root / f"run{number}"
        # the tokenizer is trained on this package's own text, which may be edited meanwhile
        shutil.copytree(alone / "data", folder / "data")
        try:
            said, problem = row(fault, folder, alone)
        except (AssertionError, RuntimeError) as error:
            said, problem = [], f"{type(error).__name__}: {error}"
        first = problem.partition("\n")[0]
        print(
            f"{fault} {'DIFFERS: ' + first if problem else 'same'}; {'; '.join(said)}", flush=True
        )
        if problem:
            lost.append(f"{fault}: {problem}")
    return lost


def main(argv=None):
    """Run the campaign; exit code 1 if anything differed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose name begins so")
    parser.add_argument("--phase", choices=PHASES)
    options = parser.parse_args(argv)
    rows = [each for each in faults() if each.name.startswith(options.only)]
    rows = [each for each in rows if options.phase in (None, each.phase)]
    with tempfile.TemporaryDirectory() as name:
        lost = campaign(rows, Path(name))
    print("\n".join([f"{len(lost)} of {len(rows)} differ", *lost]))
    return min(len(lost), 1)


if __name__ == "__main__":
    sys.exit(main())
