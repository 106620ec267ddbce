"""The Python that runs programs, and how a program's text reaches it.

Text and input come over standard input: a command line holds 128 KiB, shows in ``ps``, and would
have to be there before the interpreter starts. So an interpreter can wait, started, for a program.
"""

import functools
import os
import stat
import sys
from pathlib import Path

from megatron_k2.errors import UserError
from megatron_k2.sandbox.folder import drops_root

SYSTEM_ROOTS = ("/usr", "/lib", "/lib64", "/bin")
SYSTEM_PYTHON = Path("/usr/bin/python3")
NUM_DIGITS = 12

LOADER = f"""\
import builtins, os, sys
def take(n):
    parts = []
    while n:
        part = os.read(0, min(n, 65536))
        if not part:
            os._exit(1)
        parts.append(part)
        n -= len(part)
    return b"".join(parts)
builtins.exit = builtins.quit = sys.exit
code = compile(take(int(take({NUM_DIGITS}))), "program.py", "exec")
del builtins, os, sys, take
exec(code, globals())
"""
"""Reads exactly the program, unbuffered: what follows is the program's own input."""


@functools.cache
def default_python() -> str:
    """This interpreter without its environment, or the system's where programs cannot reach it.

    Raises:
        UserError: neither can be reached.
    """
    ours = Path(sys.base_prefix, "bin", f"python{sys.version_info[0]}.{sys.version_info[1]}")
    for path in (ours, SYSTEM_PYTHON):
        if path.exists() and (not drops_root() or _is_open_to_all(path.resolve())):
            return str(path)
    raise UserError(
        f"no Python for sandboxed programs: {ours} is closed to other users, and there is no "
        f"{SYSTEM_PYTHON}; install the system's python3, or open the folders on that path"
    )


def _is_open_to_all(path: Path) -> bool:
    others_enter = all(folder.stat().st_mode & stat.S_IXOTH for folder in path.parents)
    return others_enter and bool(path.stat().st_mode & stat.S_IROTH)


def readable_roots() -> list[str]:
    """Folders that programs may read: the system's programs and libraries, and the interpreter."""
    roots = [root for root in SYSTEM_ROOTS if os.path.exists(root)]
    own = str(Path(default_python()).resolve().parent.parent)
    return roots if own == "/usr" or own.startswith("/usr/") else [*roots, own]


def waiting_python(python: str | None = None) -> list[str]:
    """The command of an interpreter that waits for a program.

    Isolated (``-I``) and without site-packages (``-S``), which halves its start.
    """
    return [python or default_python(), "-I", "-S", "-c", LOADER]


def as_input(program: str, stdin: bytes = b"") -> bytes:
    """What a waiting interpreter is given: the program, then the program's input."""
    # What cannot be encoded was never a program; the interpreter's complaint is its result.
    text = program.encode("utf-8", "surrogatepass")
    return f"{len(text):0{NUM_DIGITS}d}".encode() + text + stdin
