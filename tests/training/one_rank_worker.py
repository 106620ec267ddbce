"""Training runs on this rank, each in a fork: ``python -m tests.training.one_rank_worker JSON``.

A case is a list of flags; with ``error``, the run must end in a ``UserError`` that says so. With
``limit`` no file may have more bytes, as on a disk that is full.
"""

import json
import re
import resource
import signal
import sys
from pathlib import Path

from tests.support.cases import run_each


def run_case(case: dict) -> None:
    from megatron_k2.errors import UserError
    from megatron_k2.training.pretrain import run

    if "limit" in case:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (case["limit"], resource.RLIM_INFINITY))
    said = ""
    try:
        run(case["flags"])
    except UserError as error:
        said = str(error)
    expected = case.get("error")
    if (expected is None) != (said == "") or not re.search(expected or "", said):
        raise AssertionError(f"said '{said}', where '{expected}' was expected")


if __name__ == "__main__":
    run_each(run_case, json.loads(Path(sys.argv[1]).read_text()))
