"""A learner that learns nothing and remembers everything, to be killed: ``tests/rl/test_kills.py``.

Its weights are a hash of all groups that it was handed; the engine's answers hang on them. A
checkpoint is made every other iteration, as a file that appears whole.

    python -m tests.rl.learning FOLDER SECONDS NUM_KILLS SEED

plays the run in forks of this process, kills each within SECONDS or in the midst of a write,
``NUM_KILLS`` times, and then lets it end.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from megatron_k2.files import write_atomically
from megatron_k2.rl import journal
from tests.rl.collecting import DrawingEngine, made

NUM_ITERATIONS, INTERVAL = 40, 2
CHECKPOINT, RESULT, TRAINED = "checkpoint.json", "result.json", "trained.txt"


def learn(folder, ledger_class=None):
    """From the last checkpoint to the end; what was trained on, in order, is in the weights."""
    path = folder / CHECKPOINT
    state = {"iteration": 0, "version": 0, "weights": "", "trained": []}
    if path.exists():
        state = json.loads(path.read_text())
    more = {} if ledger_class is None else {"ledger_class": ledger_class}
    engine = DrawingEngine(state["weights"], state["version"], jitter=0.001)
    m = made(folder / "ledger", engine=engine, **more)
    if "position" in state:
        assert m.ledger.check_position(state["position"]) == state["iteration"]
    for iteration in range(state["iteration"], NUM_ITERATIONS):
        m.engine.set(state["weights"], state["version"])
        groups = m.collect(iteration, state["version"]).groups
        said = repr(groups)
        with (folder / TRAINED).open("a") as stream:
            stream.write(f"{iteration} {hashlib.sha256(said.encode()).hexdigest()}\n")
        state["trained"] += [[iteration, group.ordinal] for group in groups]
        state["weights"] = hashlib.sha256((state["weights"] + said).encode()).hexdigest()
        state["version"] += any(group.is_live for group in groups)
        state["iteration"] = iteration + 1
        if state["iteration"] % INTERVAL == 0:
            state["position"] = m.ledger.position(iteration + 1)
            write_atomically(path, json.dumps(state).encode())
    write_atomically(folder / RESULT, json.dumps(state).encode())
    m.close()


def killed(folder, seconds, num_kills, seed):
    """Forks of this process, killed from outside and, every other one, in the midst of a write.

    Returns:
        How many were killed before they had ended.
    """
    rng, num = random.Random(seed), 0
    while not (folder / RESULT).exists():
        is_last, is_inside = num >= num_kills, num % 2
        writes = rng.randint(2, 30) if is_inside and not is_last else None
        child = os.fork()
        if not child:
            os._exit(_child(folder, writes, rng))
        if not is_last and not is_inside:
            time.sleep(seconds * rng.random())
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        num += os.WIFSIGNALED(status)
        assert os.WIFSIGNALED(status) or not status, f"a child ended with {status}"
    return num


def _child(folder, writes, rng):
    if writes is not None:
        journal._write_all = _dying(writes, rng)
    try:
        learn(folder)
    except BaseException as problem:
        print(f"{type(problem).__name__}: {problem}", file=sys.stderr, flush=True)
        return 1
    return 0


def _dying(writes, rng):
    """Writes a part of its last one, which may be none or all of it, and is gone."""
    left = [writes]

    def write(stream, content):
        left[0] -= 1
        if not left[0]:
            stream.write(content[: rng.randint(0, len(content))])
            os.kill(os.getpid(), signal.SIGKILL)
        stream.write(content)

    return write


if __name__ == "__main__":
    place, duration, number, drawn = sys.argv[1:]
    print(killed(Path(place), float(duration), int(number), int(drawn)))
