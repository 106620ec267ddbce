"""A lock's sign of life: touches the lock file for as long as its owner's process exists.

A program of its own, started by path with ``python -I -S``: a thread of the owner would stand still
while Megatron's C++ holds the interpreter's lock, minutes for a large index. It ends with its
owner, and ends its owner where the lock has become another's: two writers are worse than none.
"""

import os
import signal
import sys
import time

POLL_SECONDS = 0.5


def main() -> None:
    """``keeper.py LOCK TOKEN OWNER_PID SECONDS``: touch LOCK that often while the owner lives."""
    path, token, owner, every = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    # What ends the owner may reach its whole group long before it has saved and ended.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    beat_at = time.monotonic() + every
    while os.getppid() == owner:
        time.sleep(POLL_SECONDS)
        if time.monotonic() < beat_at:
            continue
        beat_at += every
        try:
            with open(path) as lock:
                content = lock.read()
            if token not in content:
                print(f"{path} is another's now: {content}; pid {owner} ends", file=sys.stderr)
                os.kill(owner, signal.SIGKILL)
                return
            os.utime(path)
        except OSError:
            continue  # a file system that is away for a while, or a directory that was moved


if __name__ == "__main__":
    main()
