"""What Megatron calls of ``torch.cuda`` and of tensors, answered by the CPU: ``host/cpu.py``."""

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from megatron_k2.host.redirection import Redirection

CPU = torch.device("cpu")


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


def uncompiled(function: Any = None, **_options: Any) -> Any:
    """Stands for ``torch.compile``, as a decorator with options and without."""
    return (lambda own: own) if function is None else function


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


def tensor_redirections() -> list[Redirection]:
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


def torch_cuda_redirections() -> list[Redirection]:
    """The functions and classes of ``torch.cuda``."""
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
