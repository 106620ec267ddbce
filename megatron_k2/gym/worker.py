"""A process that calls verifiers: ``python -m megatron_k2.gym.worker``, a frame in, a frame out.

A frame is four bytes of length and JSON. What a verifier prints goes nowhere, since the answers'
pipe is moved away from standard output first. A copy of this process that a verifier forked, and
that comes back here, ends.
"""

import ctypes
import importlib
import json
import os
import resource
import struct
import sys
from typing import Any, BinaryIO

MEMORY_BYTES = 3 << 30
PR_SET_CHILD_SUBREAPER = 36
HEADER = struct.Struct("=I")


def read_frame(stream: BinaryIO) -> Any:
    """The next frame's value; ``None`` at the end of the stream."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    return json.loads(stream.read(HEADER.unpack(header)[0]))


def frame(value: Any) -> bytes:
    """A value as it goes over the pipe."""
    content = json.dumps(value).encode()
    return HEADER.pack(len(content)) + content


def _called(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)(**arguments)
        json.dumps(found)
    except Exception as error:  # whatever a verifier raises is an answer: it failed
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    return {"value": found}


def main() -> None:
    """Answer until the input ends."""
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 1)
    requests = os.fdopen(os.dup(0), "rb")
    os.dup2(nothing, 0)
    # Orphans of what a verifier starts stay below this process, where they are seen and ended.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # An int of a million digits, printed, would hold the interpreter beyond any deadline's notice.
    sys.set_int_max_str_digits(4300)
    own = os.getpid()
    while (request := read_frame(requests)) is not None:
        reply = _called(request["call"], request["arguments"])
        if os.getpid() != own:
            os._exit(0)
        replies.write(frame({"id": request["id"], **reply}))


if __name__ == "__main__":
    main()
