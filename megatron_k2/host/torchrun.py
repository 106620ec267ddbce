"""Ranks on this machine: whether this process is one already, and their start through torchrun."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn, TextIO

from megatron_k2.errors import UserError

ENDED, REFUSED = "ended", "refused"
"""Keys of a rank's error file: the code with which it ended on purpose, having said why; the
sentence with which it refused an input."""
_RENDEZVOUS = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_rank(num_processes: int = 1) -> bool:
    """Whether this process is one of the ranks that torchrun, or a script like it, has started.

    Args:
        num_processes: as ``--nproc`` says; 1 where it is not given.

    Raises:
        UserError: where ``RANK`` is set without what goes with it, as a shell inside a scheduler's
            or container's step has it, or where another number of ranks was started.
    """
    if "RANK" not in os.environ:
        return False
    rank, missing = os.environ["RANK"], [name for name in _RENDEZVOUS if name not in os.environ]
    if missing:
        raise UserError(
            f"RANK={rank} is set without {', '.join(missing)}, left over from another launcher; "
            "unset RANK, or start through torchrun, which sets them all"
        )
    world_size = os.environ["WORLD_SIZE"]
    if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
        raise UserError(
            f"RANK={rank}, WORLD_SIZE={world_size}: expected a rank below a number of ranks; unset "
            "both, or start through torchrun"
        )
    if num_processes not in (1, int(world_size)):
        raise UserError(
            f"--nproc {num_processes}, but RANK={rank} and WORLD_SIZE={world_size} are set: this "
            f"process is one of {world_size} ranks already; drop --nproc, or unset RANK"
        )
    return True


def launch(module: str, argv: list[str], num_processes: int) -> int:
    """Run ``python -m module argv`` on ``num_processes`` ranks and wait.

    One rank runs without torchrun, which costs seconds of start-up. Started by torchrun already
    (``RANK`` is set), this process is one of the ranks.

    Returns:
        The exit code: 0, 2 for a wrong input, what ranks ``end`` with, anything else for a failure.
    """
    if num_processes < 1:
        raise UserError(f"--nproc {num_processes}: at least 1 rank is needed")
    command = [sys.executable, "-m", module, *argv]
    if not is_rank(num_processes) and num_processes > 1:
        agent = ["megatron_k2.host.agent", "--standalone", f"--nproc-per-node={num_processes}"]
        command = [sys.executable, "-m", *agent, "-m", module, *argv]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    return subprocess.run(command, env=environment, check=False).returncode


def refuse(program: str, error: UserError, stream: TextIO | None = None) -> int:
    """End of a rank whose input is refused: rank 0 says why, any other through torchrun.

    torchrun reads what a failed rank leaves in its error file; ``host/agent.py`` prints it.

    Args:
        program: its name, in front of the sentence.
        error: why.
        stream: where rank 0 says it; ``None``: stderr.

    Returns:
        The exit code.
    """
    sentence = f"{program}: {error}"
    _leave(sentence, {ENDED: 2, REFUSED: sentence})
    if os.environ.get("RANK", "0") == "0":
        print(sentence, file=stream or sys.stderr, flush=True)
    return 2


def end(code: int) -> NoReturn:
    """End this rank, which has said why: torchrun has nothing to report.

    Args:
        code: the whole command's exit code.

    Raises:
        SystemExit: with it.
    """
    _leave(f"ended with {code}", {ENDED: code})
    raise SystemExit(code)


def _leave(message: str, more: dict[str, int | str]) -> None:
    """In the file that torchrun reads of a rank that failed."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        seen = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(path).write_text(json.dumps({"message": seen, **more}))
