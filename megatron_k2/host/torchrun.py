"""Start a module on several ranks of this machine, through torchrun."""

import os
import subprocess
import sys

from megatron_k2.errors import UserError


def launch(module: str, argv: list[str], num_processes: int) -> int:
    """Run ``python -m module argv`` on ``num_processes`` ranks and wait.

    One rank runs without torchrun, which costs seconds of start-up. Started by torchrun already
    (``RANK`` is set), this process is one of the ranks.

    Returns:
        The exit code: 0, 2 for a wrong input, anything else for a failure.
    """
    if num_processes < 1:
        raise UserError(f"--nproc {num_processes}: at least 1 rank is needed")
    command = [sys.executable, "-m", module, *argv]
    if num_processes > 1 and "RANK" not in os.environ:
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
        command = [sys.executable, "-m", *torchrun, "-m", module, *argv]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    return subprocess.run(command, env=environment, check=False).returncode
