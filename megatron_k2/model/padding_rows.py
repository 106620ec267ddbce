"""Padding of packed documents kept at zero through the network, and out of the router's loads.

K2 has no bias and its norms map 0 to 0, so a row whose embedding is zero is exactly zero behind
every layer. That is what carries the knowledge of which rows are padding: through pipeline stages,
sequence and context parallelism, recompute and the overlapped schedule, none of which would hand a
mask on (Megatron-Core 0.19.2: ``fine_grained_callables.py`` calls the router without one, only the
first stage splits it over sequence-parallel ranks, and ``router.py:738`` applies it to the wrong
dimension). A row of tokens is never exactly zero.

What a padding row does then: its logits are 0, so it cannot lift a head's S_max above a threshold
(the local attention leaves it out altogether); the router sends it somewhere, uncounted; its loss
has weight 0; no gradient goes through it.

Rows are marked by their position, ``packed.PADDING_POSITION``, which a rotary model does not read.
"""

from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


def keep_padding_out(model: torch.nn.Module) -> None:
    """Zero padding where a stage embeds tokens, and take it out of every router's loads."""
    embedding = getattr(model, "embedding", None)
    if embedding is not None:
        embedding.register_forward_hook(_zero_padding, with_kwargs=True)
    for module in model.modules():
        if isinstance(module, TopKRouter) and module.expert_bias is not None:
            module.register_forward_hook(_uncount_padding)


def _zero_padding(
    embedding: Any, _inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    """``output`` [s, b, h], or this rank's part of s where it is split by tensor parallelism."""
    is_padding = (kwargs["position_ids"] < 0).transpose(0, 1)
    num_rows = output.shape[0]
    if num_rows < is_padding.shape[0]:
        is_padding = is_padding.narrow(0, embedding.tp_group.rank() * num_rows, num_rows)
    return output.masked_fill(is_padding[..., None], 0)


def _uncount_padding(router: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Take the choices of zero rows out of ``local_tokens_per_expert``, when they were counted.

    Megatron counts where gradients are on, which with recompute is once. No value goes to the host.
    """
    if not torch.is_grad_enabled():
        return
    hidden, (_, routing_map) = inputs[0], output
    with torch.no_grad():
        is_padding = (hidden == 0).all(-1).view(-1, 1)
        router.local_tokens_per_expert -= (routing_map & is_padding).sum(0)
