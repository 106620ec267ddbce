"""Many training runs on one rank: each in a fork of it, so that nothing of a run outlives it."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from tests.support.checkpoint_writer import fork_result_queue
from tests.support.rank_template import preload


def run_each(run: Callable[[dict], None], cases: Sequence[dict]) -> None:
    """``run(case)`` in a process of its own for each, one after another; the first failure ends.

    Megatron keeps references to a run's process groups, and gloo a thread for each that wakes a
    hundred times a second: after twenty runs in one process they took more CPU than the run. The
    ranks of a case meet in the store that ``run_ranks`` hosts for it.
    """
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
