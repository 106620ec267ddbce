"""Activations kept for backward in FP8: inputs of the experts' up-projection and of their SwiGLU.

Kimi K2 report (arXiv:2507.20534), section on activation memory: "inputs of MoE up-projections and
SwiGLU" are compressed to FP8-E4M3 in 1x128 tiles with fp32 scales; computation stays in bf16. So
the forward pass is untouched, bit for bit; the backward pass reads the two tensors back with an
error of at most 2⁻⁴ (``tiles``).

It is done where autograd saves, by ``saved_tensors_hooks`` around the experts' forward, and so for
any implementation of them: Megatron's looped and our grouped ones, Transformer Engine's grouped
product. What they save there is told apart by what it is:

- it lies in the storage of the experts' input: input of the up-projection;
- its rows are gate and up together: input of SwiGLU;
- all else (weights, routing weights, the down-projection's input) is kept as it is.

What Transformer Engine computes in FP8 it also saves in FP8, and that is kept as it is too. The
shared experts are left alone: the router keeps the input of theirs anyway (not stated).
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_k2.errors import UserError
from megatron_k2.fp8 import tiles


@dataclass(frozen=True)
class StoredTensor:
    """A saved tensor as codes and scales."""

    codes: Tensor
    """[m, k] e4m3."""
    scales: Tensor
    """[m, ceil(k / 128)] fp32."""
    dtype: torch.dtype
    """Of what was saved, and of what backward gets."""


def store(x: Tensor) -> StoredTensor:
    """``x`` [m, k] quantised, by the Triton kernel on a GPU that has E4M3."""
    kernels = _kernels(x)
    codes, scales = kernels.quantize_tiles(x.detach())
    return StoredTensor(codes, scales, x.dtype)


def restore(stored: StoredTensor) -> Tensor:
    """The matrix read back, [m, k] in its dtype."""
    kernels = _kernels(stored.codes)
    return kernels.dequantize_tiles(stored.codes, stored.scales, stored.dtype)


def _kernels(x: Tensor) -> Any:
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) < (8, 9):
        return tiles
    from megatron_k2.fp8 import triton_tiles

    return triton_tiles


class ExpertActivationStorage:
    """The pair of hooks for one forward pass of the experts of a layer.

    Args:
        hidden: the experts' input, [tokens, hidden].
        gate_up_width: columns of SwiGLU's input on this rank.
    """

    def __init__(self, hidden: Tensor, gate_up_width: int) -> None:
        # An address identifies the storage only while it lives; ``hidden`` outlives the forward.
        self._input_storage = hidden.untyped_storage().data_ptr()
        self._dtype = hidden.dtype
        self._gate_up_width = gate_up_width

    def pack(self, saved: Tensor) -> Tensor | StoredTensor:
        """What autograd keeps in place of ``saved``."""
        return store(saved) if self._is_kept_in_fp8(saved) else saved

    def unpack(self, kept: Tensor | StoredTensor) -> Tensor:
        """What backward gets."""
        return restore(kept) if isinstance(kept, StoredTensor) else kept

    def _is_kept_in_fp8(self, saved: Tensor) -> bool:
        # Parameters and Transformer Engine's quantised tensors are classes of their own; the codes
        # and scales it saves have other dtypes and no gradient.
        if type(saved) is not torch.Tensor or saved.dtype != self._dtype or saved.ndim != 2:
            return False
        # An expert without tokens too: its empty view would keep the whole input alive.
        is_input = saved.untyped_storage().data_ptr() == self._input_storage
        return is_input or (saved.requires_grad and saved.shape[1] == self._gate_up_width)


def moe_layers(model: torch.nn.Module) -> Iterator[MoELayer]:
    """Every layer with routed experts on this rank."""
    return (module for module in model.modules() if isinstance(module, MoELayer))


def store_expert_activations(model: torch.nn.Module) -> None:
    """Keep what the experts of ``model`` save for backward in FP8, from now on.

    Raises:
        UserError: where another mechanism already moves the same tensors, or SwiGLU is a chain of
            operations that each save their own.
    """
    for layer in moe_layers(model):
        check_storable(layer.config)
        width = layer.config.moe_ffn_hidden_size // layer.config.expert_tensor_parallel_size
        _keep_in_fp8(layer.experts, 2 * width)


def check_storable(config: Any) -> None:
    """Refuse what would not be stored, or twice."""
    if not config.bias_activation_fusion and config.transformer_impl != "local":
        raise UserError(
            "--fp8-activation-storage with --no-bias-swiglu-fusion or --use-te-activation-func: "
            "only Megatron's fused SwiGLU saves its input and nothing else; drop them"
        )
    if config.activation_func_fp8_input_store:
        raise UserError(
            "--fp8-activation-storage and Megatron's --activation-func-fp8-input-store (a cast "
            "without scales) keep the same tensor; drop the latter"
        )
    moved = {"expert_fc1", "moe_act"} & set(config.offload_modules or ())
    if config.fine_grained_activation_offloading and moved:
        raise UserError(
            f"--fp8-activation-storage with --offload-modules {' '.join(sorted(moved))}: both "
            "take the experts' saved tensors; offload other modules, or drop one of the two"
        )


def _keep_in_fp8(experts: torch.nn.Module, gate_up_width: int) -> None:
    compute = experts.forward

    @functools.wraps(compute)
    def forward(permuted_local_hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        hooks = ExpertActivationStorage(permuted_local_hidden_states, gate_up_width)
        with torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack):
            return compute(permuted_local_hidden_states, *args, **kwargs)

    experts.forward = forward  # type: ignore[method-assign]
