"""Activations kept for backward in FP8: inputs of the experts' up-projection and of every SwiGLU.

Kimi K2 report (arXiv:2507.20534), section on activation memory: "inputs of MoE up-projections and
SwiGLU" are compressed to FP8-E4M3 in 1x128 tiles with fp32 scales; computation stays in bf16. So
the forward pass is untouched, bit for bit; the backward pass reads the two tensors back with an
error of at most 2⁻⁴ (``tiles``).

It is done where autograd saves, by ``saved_tensors_hooks`` around the forward of an MLP or of the
experts, and so for any implementation of them: Megatron's looped and our grouped ones, Transformer
Engine's grouped product. What they save there is told apart by what it is:

- it lies in the storage of the experts' input: input of the up-projection;
- its rows are gate and up together: input of SwiGLU;
- all else (weights, routing weights, the down-projection's input) is kept as it is.

What Transformer Engine computes in FP8 it also saves in FP8, and that is kept as it is too. Of the
dense layers and the shared experts only SwiGLU's input is taken: the report names the MoE's
up-projections, and the shared experts' input is kept by the router anyway (not stated).
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_k2.errors import UserError
from megatron_k2.fp8.pack import ActivationStorage

EXPERT_GROUPS = frozenset({"expert_fc1", "moe_act"})
"""Of Megatron's ``--offload-modules``, those that act inside the experts (``offload.py``)."""


def store_activations(model: torch.nn.Module) -> None:
    """Keep what the MLPs and experts of ``model`` save for backward in FP8, from now on.

    Raises:
        UserError: where another mechanism already stores the same tensors, or SwiGLU is a chain of
            operations that each save their own.
    """
    for layer in model.modules():
        if not isinstance(layer, TransformerLayer):
            continue
        check_storable(layer.config)
        for module, width, is_input_stored in _parts(layer.mlp):
            _keep_in_fp8(module, 2 * width, is_input_stored=is_input_stored)


def _parts(mlp: Any) -> Iterator[tuple[torch.nn.Module, int, bool]]:
    """(module, its SwiGLU's width on this rank, whether its input is stored) in a layer's MLP."""
    config = mlp.config
    if not isinstance(mlp, MoELayer):
        yield mlp, config.ffn_hidden_size // config.tensor_model_parallel_size, False
        return
    yield mlp.experts, config.moe_ffn_hidden_size // config.expert_tensor_parallel_size, True
    if mlp.shared_experts is not None:
        width = config.moe_shared_expert_intermediate_size // config.tensor_model_parallel_size
        yield mlp.shared_experts, width, False


def check_storable(config: Any) -> None:
    """Refuse what would not be stored, or twice."""
    if config.use_te_activation_func:
        raise UserError(
            "--fp8-activation-storage with --use-te-activation-func: only Megatron's fused SwiGLU "
            "saves its input and nothing else; drop the latter"
        )
    if config.activation_func_fp8_input_store:
        raise UserError(
            "--fp8-activation-storage and Megatron's --activation-func-fp8-input-store (a cast "
            "without scales) keep the same tensor; drop the latter"
        )


def _keep_in_fp8(module: torch.nn.Module, gate_up_width: int, *, is_input_stored: bool) -> None:
    compute = module.forward
    config: Any = module.config
    goes_to_host = config.fine_grained_activation_offloading and not EXPERT_GROUPS.isdisjoint(
        config.offload_modules or ()
    )

    @functools.wraps(compute)
    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        hooks = ActivationStorage(hidden, gate_up_width, is_input_stored=is_input_stored)
        with torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack):
            if not (goes_to_host and is_input_stored):
                return compute(hidden, *args, **kwargs)
            from megatron_k2.fp8.offload import storing_before_offload

            with storing_before_offload(hooks):
                return compute(hidden, *args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]
