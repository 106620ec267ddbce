"""Verifiers that go wrong in every way, called by name in worker processes."""

import os
import signal
import sys
import time

RIGHT = {"outcome": "right", "evidence": "as asked"}


def verify(how: str, answer: str):
    return {
        "right": lambda: RIGHT,
        "echo": lambda: {"outcome": "right", "evidence": answer},
        "raises": lambda: 1 / 0,
        "exits": lambda: sys.exit(0),
        "dies": lambda: os._exit(3),
        "is_killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "spins": _spin,
        "sleeps": lambda: time.sleep(600),
        "ignores_signals": _ignore,
        "forks": _fork,
        "forks_and_returns": _fork_and_return,
        "prints": _print,
        "returns_none": lambda: None,
        "returns_an_object": lambda: {"outcome": "right", "evidence": object()},
        "returns_a_number": lambda: 1.0,
        "takes_memory": lambda: bytearray(20 << 30) and RIGHT,
        "works": lambda: _work(0.2),
    }[how]()


def _spin():
    while True:
        pass


def _ignore():
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    _spin()


def _fork():
    if os.fork() == 0:
        os.setsid()
        time.sleep(600)
        os._exit(0)
    return RIGHT


def _fork_and_return():
    os.fork()  # both come back to whoever called
    time.sleep(0.05)
    return RIGHT


def _print():
    print("x" * 100_000)
    os.write(1, b"\x04\x00\x00\x00null" * 10)
    sys.stdout.flush()
    return RIGHT


def _work(seconds: float):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return RIGHT
