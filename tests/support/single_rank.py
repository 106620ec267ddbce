"""Megatron in the test's own process: one rank, on the CPU host, the model built from flags."""

import contextlib
from dataclasses import replace

from megatron_k2.presets import K2_TINY, YarnScaling
from megatron_k2.selfcheck.one_rank import arguments, build, randomise
from megatron_k2.selfcheck.one_rank import one_rank as one_rank_of_megatron
from tests.support.devices import on_device

__all__ = ["SMALL", "arguments", "build", "one_rank", "randomise"]

SMALL = replace(
    K2_TINY,
    num_layers=3,
    hidden_size=48,
    ffn_hidden_size=80,
    num_attention_heads=4,
    q_lora_rank=32,
    kv_lora_rank=24,
    qk_head_dim=16,
    qk_pos_emb_head_dim=8,
    v_head_dim=12,
    num_moe_experts=8,
    moe_router_topk=3,
    moe_ffn_hidden_size=20,
    vocab_size=96,
    yarn=YarnScaling(8.0, 32, 1.0, 1.0, 1.0, 1.0),
)


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
