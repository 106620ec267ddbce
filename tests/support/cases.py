"""Many training runs on one rank: each in a fork of it, so that nothing of a run outlives it."""

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence

from tests.support.checkpoint_writer import fork_result_queue
from tests.support.rank_template import preload


def run_each(run: Callable[[dict], None], cases: Sequence[dict]) -> None:
    """``run(case)`` in a process of its own for each, one after another; the first failure ends.

    Megatron keeps references to a run's process groups, and gloo a thread for each that wakes a
    hundred times a second: after twenty runs in one process they took more CPU than the run. The
    ranks of a case meet in the store that ``run_ranks`` hosts for it.

    With a GPU in sight each case is started anew: CUDA does not live through a fork.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        _start_each(run, cases)
        return
    preload()
    fork_result_queue()
    ports = os.environ["CASE_PORTS"].split(",")
    for case, port in zip(cases, ports, strict=True):
        os.environ["MASTER_PORT"] = port
        child = os.fork()
        if child == 0:
            os._exit(_exit_code(run, case))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            sys.exit(code)


def _start_each(run: Callable[[dict], None], cases: Sequence[dict]) -> None:
    ports = os.environ["CASE_PORTS"].split(",")
    if len(cases) == 1:
        os.environ["MASTER_PORT"] = ports[0]
        sys.exit(_exit_code(run, cases[0]))
    module = sys.modules["__main__"].__spec__.name
    for case, port in zip(cases, ports, strict=True):
        with tempfile.NamedTemporaryFile("w", suffix=".json") as payload:
            json.dump([case], payload)
            payload.flush()
            command = [sys.executable, "-m", module, payload.name]
            done = subprocess.run(command, env=os.environ | {"CASE_PORTS": port}, check=False)
        if done.returncode:
            sys.exit(done.returncode)


def _exit_code(run: Callable[[dict], None], case: dict) -> int:
    """0 where ``run`` returns, or exits as Megatron does at ``--exit-interval``."""
    try:
        run(case)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    return code
