"""A machine without CUDA as Megatron's host: ``with cpu_host(): …`` runs it on CPU over gloo.

Megatron-Core 0.19.2 hard-wires CUDA in some forty places. While the context is entered, each of
them is answered by the CPU; on exit everything is as before. Nothing is patched at import, and the
context refuses a machine that has CUDA and a Megatron version it was not checked against.

Each redirection is one row of ``_redirections``: what is replaced, by what, and the upstream
line that needs it (files relative to ``megatron/``, version 0.19.2).
"""

import contextlib
import functools
import importlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_k2.host.repairs import l2_norm, require_checked_megatron

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Redirection:
    """One attribute of a module that is replaced while the context is entered."""

    target: str
    """Dotted path of the attribute."""
    replacement: Any
    needed_by: str
    """Upstream line that calls it, ``file:line`` under ``megatron/``."""


class _CpuStream:
    """Stands for ``torch.cuda.Stream``: work on a CPU is already in order."""

    cuda_stream = 0
    device = CPU

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def wait_stream(self, _stream: Any) -> None: ...

    def wait_event(self, _event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _CpuEvent()


class _CpuEvent:
    """Stands for ``torch.cuda.Event``; always complete."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def record(self, *_args: Any) -> None: ...

    def wait(self, *_args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _end: Any) -> float:
        return 0.0


class _CpuDeviceProperties:
    """Stands for ``torch.cuda.get_device_properties``: the arch that needs no legacy flags."""

    major, minor, name = 9, 0, "cpu"
    total_memory, multi_processor_count = 1 << 34, 1


def _is_cuda(device: Any) -> bool:
    if isinstance(device, bool) or device is None:
        return False
    return isinstance(device, int) or str(device).startswith("cuda")


def _creating_on_cpu(create: Callable[..., Any]) -> Callable[..., Any]:
    """A factory of tensors to which ``device="cuda"`` means the CPU; its memory is never pinned."""

    @functools.wraps(create)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return create(*args, **kwargs)

    return on_cpu


def _moving_to_cpu(to: Callable[..., Any]) -> Callable[..., Any]:
    """``Tensor.to`` to which a CUDA device, by position or name, means the CPU."""

    @functools.wraps(to)
    def to_cpu(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], (str, torch.device, int)) and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return to(tensor, *args, **kwargs)

    return to_cpu


def _naming_a_cuda_type(type_of: Callable[..., Any]) -> Callable[..., Any]:
    """``Tensor.type`` that names the CUDA type, which upstream compares with."""

    @functools.wraps(type_of)
    def cuda_type(*args: Any, **kwargs: Any) -> Any:
        result = type_of(*args, **kwargs)
        if isinstance(result, str) and not result.startswith("torch.cuda."):
            return result.replace("torch.", "torch.cuda.")
        return result

    return cuda_type


def _tensor_redirections() -> list[Redirection]:
    """Literal ``"cuda"`` and the methods of a tensor that want a GPU."""

    def unchanged(tensor: Any, *_args: Any, **_kwargs: Any) -> Any:
        return tensor

    def nothing(*_args: Any, **_kwargs: Any) -> None:
        return None

    factories = {
        "tensor": "core/optimizer/optimizer.py:690",
        "zeros": "core/pipeline_parallel/schedules.py:749",
        "ones": "core/transformer/utils.py:39",
        "empty": "core/transformer/cuda_graphs.py:170",
        "empty_like": "core/dist_checkpointing/exchange_utils.py:103",
        "rand": "training/initialize.py:508",
        "randn": "training/gpu_sniff_test.py:141",
    }
    return [
        *(
            Redirection(f"torch.{name}", _creating_on_cpu(getattr(torch, name)), line)
            for name, line in factories.items()
        ),
        Redirection(
            "torch.Tensor.to",
            _moving_to_cpu(torch.Tensor.to),
            "core/optimizer/cpu_offloading/hybrid_optimizer.py:367",
        ),
        Redirection(
            "torch.Tensor.type",
            _naming_a_cuda_type(torch.Tensor.type),
            "core/optimizer/distrib_optimizer.py:401",
        ),
        Redirection(
            "torch.Tensor.cuda", unchanged, "core/models/common/embeddings/rope_utils.py:64"
        ),
        Redirection(
            "torch.Tensor.pin_memory",
            unchanged,
            "core/optimizer/cpu_offloading/hybrid_optimizer.py:274",
        ),
        Redirection(
            "torch.Tensor.record_stream", nothing, "core/transformer/moe/moe_utils.py:1189"
        ),
    ]


def _torch_cuda_redirections() -> list[Redirection]:
    stream = _CpuStream()
    get_state, set_state = torch.get_rng_state, torch.set_rng_state

    def constant(value: Any) -> Callable[..., Any]:
        return lambda *_args, **_kwargs: value

    rows: list[tuple[str, Any, str]] = [
        ("current_device", constant(CPU), "core/transformer/moe/router.py:98"),
        ("synchronize", constant(None), "core/pipeline_parallel/p2p_communication.py:419"),
        ("empty_cache", constant(None), "training/checkpointing.py:2727"),
        ("set_device", constant(None), "training/initialize.py:282"),
        ("get_rng_state", lambda *_a, **_k: get_state(), "training/checkpointing.py:417"),
        ("set_rng_state", lambda s, *_a, **_k: set_state(s), "training/checkpointing.py:2665"),
        (
            "random.get_rng_state",
            lambda *_a, **_k: get_state(),
            "core/tensor_parallel/random.py:118",
        ),
        ("manual_seed", torch.manual_seed, "core/tensor_parallel/random.py:490"),
        ("Stream", _CpuStream, "core/transformer/moe/token_dispatcher.py:469"),
        ("Event", _CpuEvent, "core/transformer/moe/moe_layer.py:434"),
        ("current_stream", constant(stream), "core/distributed/param_and_grad_buffer.py:632"),
        (
            "stream",
            lambda _s: contextlib.nullcontext(),
            "core/transformer/moe/shared_experts.py:237",
        ),
        (
            "is_current_stream_capturing",
            constant(False),
            "core/transformer/moe/token_dispatcher.py:1636",
        ),
        ("memory_allocated", constant(0), "training/utils/common_utils.py:322"),
        ("max_memory_allocated", constant(0), "training/utils/common_utils.py:323"),
        ("memory_reserved", constant(0), "training/utils/common_utils.py:324"),
        ("max_memory_reserved", constant(0), "training/utils/common_utils.py:325"),
        ("memory_stats", lambda *_a, **_k: defaultdict(int), "training/training.py:2742"),
        (
            "get_device_properties",
            constant(_CpuDeviceProperties()),
            "training/utils/common_utils.py:504",
        ),
        ("get_device_capability", constant((9, 0)), "training/arguments.py:1339"),
        ("nvtx.range_push", constant(None), "core/utils.py:2729"),
        ("nvtx.range_pop", constant(None), "core/utils.py:2758"),
    ]
    return [Redirection(f"torch.cuda.{name}", value, line) for name, value, line in rows]


def _split_sizes_as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """``maybe_move_tensor_to_cpu`` converts only CUDA tensors (moe_utils.py:1184)."""
    del record_stream
    return tensor.detach().numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _scale(_chunk: int, _overflow: Any, lists: list[list[Any]], factor: float) -> None:
    """``destination = source * factor``. Upstream's fallback makes a copy of each tensor."""
    sources, destinations = lists
    if not destinations:
        return
    if sources is not destinations:
        torch._foreach_copy_(destinations, sources)
    torch._foreach_mul_(destinations, factor)


def _initialize_believing_in_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    """``initialize_megatron`` asks for CUDA by assertion and gates its groups on device_count.

    ``training/initialize.py:66``, ``:270`` and ``:447``.
    """

    def initialize(*args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            _replace(stack, "torch.cuda.is_available", lambda: True)
            _replace(stack, "torch.cuda.device_count", lambda: 1)
            return original(*args, **kwargs)

    return initialize


def _warming_up_unsplit(original: Callable[..., Any]) -> Callable[..., Any]:
    """The warm-up of fused functions, which draws as many random numbers at any TP and CP.

    It fills tensors of a rank's own sizes from what is here the generator of the initial weights
    too (``training/initialize.py:497``): a fresh start at TP2 began with other weights than at TP1.
    """

    def warm_up(tp_size: int | None = None) -> Any:
        from megatron.training import get_args

        del tp_size
        args = get_args()
        unsplit = {
            "tensor_model_parallel_size": 1,
            "context_parallel_size": 1,
            "sequence_parallel": False,
        }
        before = {name: getattr(args, name) for name in unsplit}
        vars(args).update(unsplit)
        try:
            return original(tp_size=1)
        finally:
            vars(args).update(before)

    return warm_up


def _megatron_redirections() -> list[Redirection]:
    import megatron.training.training as training

    get_state, set_state = torch.get_rng_state, torch.set_rng_state
    return [
        Redirection(
            "megatron.core.tensor_parallel.random._get_cuda_rng_state",
            lambda *_args, **_kwargs: get_state(),
            "core/tensor_parallel/random.py:188",
        ),
        Redirection(
            "megatron.core.tensor_parallel.random._set_cuda_rng_state",
            lambda state, *_args, **_kwargs: set_state(state),
            "core/tensor_parallel/random.py:308",
        ),
        Redirection(
            "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu",
            _split_sizes_as_numpy,
            "core/transformer/moe/token_dispatcher.py:927",
        ),
        Redirection(
            "megatron.core.optimizer.clip_grads.l2_norm_impl",
            l2_norm,
            "core/optimizer/clip_grads.py:117",
        ),
        Redirection(
            "megatron.core.optimizer.clip_grads.multi_tensor_scale_impl",
            _scale,
            "core/optimizer/clip_grads.py:191",
        ),
        Redirection(
            "megatron.training.training.initialize_megatron",
            _initialize_believing_in_cuda(training.initialize_megatron),
            "training/training.py:1091",
        ),
        Redirection(
            "megatron.training.training.set_jit_fusion_options",
            _warming_up_unsplit(training.set_jit_fusion_options),
            "training/training.py:1117",
        ),
    ]


def _replace(stack: contextlib.ExitStack, target: str, replacement: Any) -> None:
    owner_path, name = target.rsplit(".", 1)
    try:
        owner = importlib.import_module(owner_path)
    except ModuleNotFoundError:  # an attribute of a class or object, such as torch.cuda.nvtx
        parent, attribute = owner_path.rsplit(".", 1)
        owner = getattr(importlib.import_module(parent), attribute)
    previous = getattr(owner, name)
    setattr(owner, name, replacement)
    stack.callback(setattr, owner, name, previous)


def flushes_subnormals() -> bool:
    """Whether this thread's arithmetic takes subnormal numbers for zero."""
    return torch.full((), 2.0**-140).mul(2).item() == 0


def _set_environment(stack: contextlib.ExitStack, name: str, value: str) -> None:
    """Set what the user has not set."""
    if name not in os.environ:
        os.environ[name] = value
        stack.callback(os.environ.pop, name, None)


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
        # core/jit.py binds jit_fuser = torch.compile, which has nothing to fuse for here.
        _set_environment(stack, "TORCHDYNAMO_DISABLE", "1")
        # training/arguments.py:1437 asserts it for TP or CP above 1.
        _set_environment(stack, "CUDA_DEVICE_MAX_CONNECTIONS", "1")
        for row in (*_torch_cuda_redirections(), *_tensor_redirections()):
            _replace(stack, row.target, row.replacement)
        # Subnormal numbers make CPU matrix products ten times slower; GPUs flush them in hardware.
        stack.callback(torch.set_flush_denormal, flushes_subnormals())
        torch.set_flush_denormal(True)
        for row in _megatron_redirections():
            _replace(stack, row.target, row.replacement)
        yield


@contextlib.contextmanager
def meta_host() -> Iterator[None]:
    """Inside ``cpu_host()``: what Megatron puts on the current device has a shape and no memory."""
    with contextlib.ExitStack() as stack:
        _replace(stack, "torch.cuda.current_device", lambda: torch.device("meta"))
        yield


@contextlib.contextmanager
def megatron_host() -> Iterator[str]:
    """``cpu_host()`` unless there is CUDA; yields the backend's name, ``nccl`` or ``gloo``."""
    if torch.cuda.is_available():
        yield "nccl"
        return
    with cpu_host():
        yield "gloo"
