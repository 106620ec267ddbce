"""What Megatron itself does for CUDA alone, done for a CPU; see ``host/cpu.py``."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from megatron_k2.host.redirection import Redirection, replace
from megatron_k2.host.repairs import l2_norm


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
            replace(stack, "torch.cuda.is_available", lambda: True)
            replace(stack, "torch.cuda.device_count", lambda: 1)
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


def megatron_redirections() -> list[Redirection]:
    """Functions of Megatron's own modules, which are imported here."""
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
