"""What "cuda" means to TE's Python on a CPU. Plain replacements, never undone: a process is for TE.

``megatron_k2.host.cpu`` answers Megatron by a ``TorchFunctionMode``; modes are switched
off inside ``autograd.Function.backward``, where TE makes most of its tensors, so the factories
themselves are replaced here. ``Tensor.is_cuda`` is true only when TE's own code asks.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

_target = torch.device("cpu")

FACTORIES = (
    "empty zeros ones full rand randn randint arange tensor as_tensor linspace eye empty_like "
    "zeros_like ones_like full_like rand_like randn_like empty_strided"
).split()


@contextlib.contextmanager
def cuda_means(device: str) -> Iterator[None]:
    """Let "cuda" be ``cpu`` (the default), or ``meta`` to build a model too large for memory."""
    global _target
    before, _target = _target, torch.device(device)
    try:
        yield
    finally:
        _target = before


def _redirected(device: Any) -> Any:
    if isinstance(device, bool):
        return device
    is_index = isinstance(device, int)
    names_cuda = isinstance(device, (str, torch.device)) and str(device).startswith("cuda")
    return _target if is_index or names_cuda else device


def _is_called_by_te() -> bool:
    frame = sys._getframe(2)
    for _ in range(2):
        if frame is None:
            return False
        if frame.f_globals.get("__name__", "").startswith("transformer_engine"):
            return True
        frame = frame.f_back
    return False


def patch_devices() -> None:
    """Factories, ``Tensor.to``, ``Tensor.cuda`` and what TE asks of ``torch.cuda``."""
    for name in FACTORIES:
        setattr(torch, name, _with_redirected_device(getattr(torch, name)))
    to, is_cuda = torch.Tensor.to, torch._C.TensorBase.is_cuda

    def redirected_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = tuple(_redirected(a) if isinstance(a, (str, torch.device)) else a for a in args)
        if "device" in kwargs:
            kwargs["device"] = _redirected(kwargs["device"])
        return to(self, *args, **kwargs)

    torch.Tensor.to = redirected_to
    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self
    torch.nn.Module.cuda = lambda self, *_args, **_kwargs: self
    torch.Tensor.is_cuda = property(
        lambda self: (self.device.type == "cpu" and _is_called_by_te()) or is_cuda.__get__(self)
    )
    _patch_torch_cuda()


def _with_redirected_device(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _redirected(kwargs["device"])
        return factory(*args, **kwargs)

    return make


class _Properties:
    major, minor, name = 9, 0, "cpu standing for sm_90"
    multi_processor_count, total_memory, L2_cache_size = 132, 80 << 30, 50 << 20


class _Stream:
    """Work on a CPU is in order and complete."""

    cuda_stream = 0

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def record_event(self, *_args: Any) -> "_Stream":
        return self

    def query(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_args, **_kwargs: None


def _patch_torch_cuda() -> None:
    stream = _Stream()
    answers: dict[str, Callable[..., Any]] = {
        "current_device": lambda: _target,
        "get_device_properties": lambda _device=None: _Properties(),
        "get_device_capability": lambda _device=None: (9, 0),
        "current_stream": lambda *_args: stream,
        "default_stream": lambda *_args: stream,
        "synchronize": lambda *_args: None,
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda *_args, **_kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *_args, **_kwargs: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "is_initialized": lambda: False,
        "_lazy_init": lambda: None,
        "_lazy_call": lambda _call, **_kwargs: None,
        "stream": lambda _stream: contextlib.nullcontext(),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.cuda.Stream = torch.cuda.Event = _Stream
    torch.cuda.default_generators = (torch.default_generator,)
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.random.set_rng_state = torch.cuda.set_rng_state
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_args: None


def believe_in_cuda(init: Callable[..., None]) -> Callable[..., None]:
    """TE's modules refuse to be built without CUDA; while one is, there is."""

    @functools.wraps(init)
    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        original, torch.cuda.is_available = torch.cuda.is_available, lambda: True
        try:
            init(self, *args, **kwargs)
        finally:
            torch.cuda.is_available = original

    return build
