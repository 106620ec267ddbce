"""Which back-end: by name, or the strongest that passes the escape suite on this machine.

A verdict is kept for one machine, kernel, user, version of the back-end and text of the suite, so
the suite runs once and not before every use.
"""

import hashlib
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

from megatron_k2.errors import UserError
from megatron_k2.files import write_atomically
from megatron_k2.sandbox.bare import Bare
from megatron_k2.sandbox.bwrap import Bwrap
from megatron_k2.sandbox.escapes.judge import Verdict, try_all
from megatron_k2.sandbox.escapes.read import suite, suite_text
from megatron_k2.sandbox.kubernetes import Kubernetes
from megatron_k2.sandbox.protocol import Backend
from megatron_k2.sandbox.sandlock import Sandlock

SANDBOXES: dict[str, Callable[[], Backend]] = {
    "bwrap": Bwrap,
    "sandlock": Sandlock,
    "kubernetes": Kubernetes,
    "bare": Bare,
}
STRONGEST_FIRST = ("bwrap", "sandlock")
"""bwrap: processes, network and files of its own, limits that the kernel holds. sandlock shares the
process table, its supervisor lives in our process, and 0.9.0 refuses some honest forks."""


def backend_named(name: str) -> Backend:
    """A back-end that can run here.

    Raises:
        UserError: no such name, or it cannot run on this machine.
    """
    if name not in SANDBOXES:
        raise UserError(f"no sandbox back-end {name!r}; one of: {', '.join(SANDBOXES)}")
    backend = SANDBOXES[name]()
    if problem := backend.missing():
        raise UserError(f"sandbox back-end {name}: {problem}")
    return backend


async def default_backend(tell: Callable[[str], None] = lambda _: None) -> Backend:
    """The strongest that passes the suite here; the suite runs where no verdict is kept.

    Args:
        tell: is called with what is being done, where that takes time.

    Raises:
        UserError: none passes.
    """
    reasons = []
    for name in STRONGEST_FIRST:
        backend = SANDBOXES[name]()
        problem = backend.missing()
        if problem is None:
            escaped = kept_verdict(backend)
            if escaped is None:
                tell(f"trying the escape suite on {name}, once on this machine")
                escaped = keep_verdict(backend, await try_all(backend, suite()))
            if not escaped:
                return backend
            problem = f"does not pass the escape suite: {', '.join(escaped)}"
        reasons.append(f"{name}: {problem}")
    raise UserError(
        "no sandbox for programs on this machine; "
        + "; ".join(reasons)
        + ". Make one of them work, or ask for `bare`, which confines nothing, by name"
    )


def kept_verdict(backend: Backend) -> list[str] | None:
    """Names of the suite's programs that a back-end did not hold; ``None``: it was not tried."""
    try:
        found = json.loads(_verdict_path(backend).read_text())
    except (OSError, ValueError):
        return None
    is_list = isinstance(found, list) and all(isinstance(name, str) for name in found)
    return found if is_list else None


def keep_verdict(backend: Backend, verdicts: list[Verdict]) -> list[str]:
    """Store and return the names of the programs that were not held."""
    escaped = [verdict.name for verdict in verdicts if not verdict.has_held]
    path = _verdict_path(backend)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(escaped).encode())
    except OSError:  # a machine without a home: the suite then runs every time
        pass
    return escaped


def _verdict_path(backend: Backend) -> Path:
    facts = [
        *(backend.name, backend.version(), platform.release(), platform.node()),
        *(str(os.geteuid()), suite_text()),
        # What confines is ours too: a change of it takes the verdict back.
        *(path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))),
    ]
    digest = hashlib.sha256("\0".join(facts).encode()).hexdigest()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "megatron_k2", "sandbox", f"{backend.name}-{digest[:24]}.json")
