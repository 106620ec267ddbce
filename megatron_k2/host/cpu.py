"""A machine without CUDA as Megatron's host: ``with cpu_host(): …`` runs it on CPU over gloo.

Megatron-Core 0.19.2 hard-wires CUDA in some forty places. While the context is entered, each of
them is answered by the CPU; on exit everything is as before. Nothing is patched at import, and the
context refuses a machine that has CUDA and a Megatron version it was not checked against.

Each redirection is a row of ``cpu_torch`` or ``cpu_megatron``: what is replaced, by what, and the
upstream line that needs it (files relative to ``megatron/``, version 0.19.2).
"""

import contextlib
import os
import sys
from collections.abc import Iterator

import torch

from megatron_k2.host.cpu_megatron import megatron_redirections
from megatron_k2.host.cpu_torch import tensor_redirections, torch_cuda_redirections, uncompiled
from megatron_k2.host.redirection import replace
from megatron_k2.host.repairs import require_checked_megatron


def flushes_subnormals() -> bool:
    """Whether this thread's arithmetic takes subnormal numbers for zero."""
    return torch.full((), 2.0**-140).mul(2).item() == 0


def _set_environment(stack: contextlib.ExitStack, name: str, value: str) -> None:
    """Set what the user has not set."""
    if name not in os.environ:
        os.environ[name] = value
        stack.callback(os.environ.pop, name, None)


def _stop_compiling(stack: contextlib.ExitStack) -> None:
    """core/jit.py binds jit_fuser = torch.compile, which has nothing to fuse for here.

    What Megatron decorates while the context is entered stays as it is, and the compiler is never
    loaded, a third of the CPU seconds that importing Megatron takes. The variable is for processes
    that are started meanwhile, the stance for what was decorated before: the compiler that is
    loaded has read the variable already.
    """
    _set_environment(stack, "TORCHDYNAMO_DISABLE", "1")
    replace(stack, "torch.compile", uncompiled)
    if "torch._dynamo" in sys.modules:
        stack.enter_context(torch.compiler.set_stance("force_eager"))


@contextlib.contextmanager
def cpu_host() -> Iterator[None]:
    """Run Megatron-Core and ``megatron.training`` on CPU over gloo while entered.

    The random state of the CPU doubles as "CUDA" random state. ``torch.compile`` is off, and
    subnormal numbers are flushed to zero.

    Raises:
        UserError: on a Megatron-Core version that was not checked.
        RuntimeError: on a machine that has CUDA, where nothing may be redirected.
    """
    if torch.cuda.is_available():
        raise RuntimeError("cpu_host() redirects CUDA calls; this machine has CUDA, run without it")
    require_checked_megatron()
    with torch.device("meta"):  # here torch notes its factories, once, and knows them by identity
        torch.empty(0)
    with contextlib.ExitStack() as stack:
        _stop_compiling(stack)
        # training/arguments.py:1437 asserts it for TP or CP above 1.
        _set_environment(stack, "CUDA_DEVICE_MAX_CONNECTIONS", "1")
        for row in (*torch_cuda_redirections(), *tensor_redirections()):
            replace(stack, row.target, row.replacement)
        # Subnormal numbers make CPU matrix products ten times slower; GPUs flush them in hardware.
        stack.callback(torch.set_flush_denormal, flushes_subnormals())
        torch.set_flush_denormal(True)
        for row in megatron_redirections():
            replace(stack, row.target, row.replacement)
        yield


@contextlib.contextmanager
def meta_host() -> Iterator[None]:
    """Inside ``cpu_host()``: what Megatron puts on the current device has a shape and no memory."""
    with contextlib.ExitStack() as stack:
        replace(stack, "torch.cuda.current_device", lambda: torch.device("meta"))
        yield


@contextlib.contextmanager
def megatron_host() -> Iterator[str]:
    """``cpu_host()`` unless there is CUDA; yields the backend's name, ``nccl`` or ``gloo``."""
    if torch.cuda.is_available():
        yield "nccl"
        return
    with cpu_host():
        yield "gloo"
