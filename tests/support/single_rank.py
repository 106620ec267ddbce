"""Megatron in the test's own process: one rank, on the CPU host, the model built from flags."""

import contextlib

from megatron_k2.selfcheck.one_rank import arguments, build, randomise
from megatron_k2.selfcheck.one_rank import one_rank as one_rank_of_megatron
from tests.support.devices import on_device
from tests.support.shapes import SMALL

__all__ = ["SMALL", "arguments", "build", "one_rank", "randomise"]


@contextlib.contextmanager
def one_rank(device: str | None = None):
    """A world of one rank, and what Megatron keeps globally about it.

    Args:
        device: ``cpu`` or ``cuda``, on which the test's own tensors are made too; skips where this
            process has none. ``None``: Megatron's on the GPU where there is one, the test's as it
            says.
    """
    made = on_device(device) if device else contextlib.nullcontext()
    with made, one_rank_of_megatron():
        yield
