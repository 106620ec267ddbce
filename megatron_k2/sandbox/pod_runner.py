"""What runs inside a pod: reads ``request.json``, runs its command once, prints what became of it.

Only the standard library, and nothing of this package: the file is sent to the pod as it is. Bytes
are base64. Limits of one process are the kernel's; what a pod may take as a whole, and its network,
are its template's to say.
"""

import base64
import contextlib
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from typing import Any

MARK = "megatron_k2 result "
BOX = "box"


def _inside(name: str) -> str:
    path = os.path.normpath(name)
    if os.path.isabs(path) or path.split(os.sep)[0] == "..":
        raise ValueError(f"{name!r} leaves the folder")
    place = BOX
    for part in path.split(os.sep)[:-1]:
        place = os.path.join(place, part)
        if os.path.islink(place):
            raise ValueError(f"{name!r} leads through a symbolic link")
        os.makedirs(place, exist_ok=True)
    return os.path.join(BOX, path)


def _write(files: dict[str, str]) -> None:
    os.makedirs(BOX, exist_ok=True)
    for name, content in files.items():
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        with os.fdopen(os.open(_inside(name), flags, 0o644), "wb") as stream:
            stream.write(base64.b64decode(content))


def _read(name: str, most: int) -> dict[str, str]:
    with os.fdopen(os.open(_inside(name), os.O_RDONLY | os.O_NOFOLLOW), "rb") as stream:
        return {"content": base64.b64encode(stream.read(most)).decode()}


def _limited(limits: dict[str, Any]) -> Any:
    def before_exec() -> None:
        os.setsid()
        for kind, value in (
            (resource.RLIMIT_AS, limits["memory_bytes"]),
            (resource.RLIMIT_NOFILE, limits["num_files"]),
            (resource.RLIMIT_FSIZE, limits["disk_bytes"]),
            (resource.RLIMIT_CPU, int(limits["cpu_seconds"]) + 1),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(kind, (value, value))

    return before_exec


def _run(request: dict[str, Any]) -> dict[str, Any]:
    limits, began = request["limits"], time.monotonic()
    child = subprocess.Popen(
        request["command"],
        cwd=BOX,
        env=request["environment"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=_limited(limits),
    )
    said, reason = _talk(child, base64.b64decode(request["stdin"]), limits, began)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    _, status, usage = os.wait4(child.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if not reason and code == -signal.SIGXCPU:
        reason = "cpu"
    return {
        "exit_code": code,
        "reason": reason,
        "stdout": base64.b64encode(said[0]).decode(),
        "stderr": base64.b64encode(said[1]).decode(),
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "wall_seconds": time.monotonic() - began,
    }


def _talk(
    child: Any, given: bytes, limits: dict[str, Any], began: float
) -> tuple[tuple[bytearray, bytearray], str]:
    """Both outputs, and the limit that ended it: ``wall``, ``output``, or none."""
    said = (bytearray(), bytearray())
    with selectors.DefaultSelector() as waiting:
        for pipe in (child.stdin, child.stdout, child.stderr):
            os.set_blocking(pipe.fileno(), False)
        waiting.register(child.stdin, selectors.EVENT_WRITE)
        waiting.register(child.stdout, selectors.EVENT_READ, 0)
        waiting.register(child.stderr, selectors.EVENT_READ, 1)
        while waiting.get_map():
            left = limits["wall_seconds"] - (time.monotonic() - began)
            if left <= 0:
                return said, "wall"
            for key, _ in waiting.select(left):
                if key.data is None:
                    given = _put(waiting, child.stdin, given)
                elif part := os.read(key.fd, 65536):
                    said[key.data].extend(part)
                else:
                    waiting.unregister(key.fileobj)
                if sum(map(len, said)) > limits["output_bytes"]:
                    return said, "output"
    return said, ""


def _put(waiting: selectors.BaseSelector, pipe: Any, given: bytes) -> bytes:
    try:
        given = given[os.write(pipe.fileno(), given[:65536]) :] if given else given
    except BlockingIOError:
        return given
    except BrokenPipeError:
        given = b""
    if not given:
        waiting.unregister(pipe)
        pipe.close()
    return given


def main() -> None:
    """Answer one request."""
    with open("request.json", encoding="utf-8") as stream:
        request = json.load(stream)
    try:
        _write(request["files"])
        found = _read(request["read"], request["most"]) if "read" in request else _run(request)
    except (OSError, ValueError) as problem:
        found = {"error": f"{type(problem).__name__}: {problem}"}
    print(MARK + request["id"] + " " + json.dumps(found))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
