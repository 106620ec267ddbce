"""What a layer keeps for its backward, tensor by tensor, of the modules without Transformer Engine.

As ``activations.py``, for ``--transformer-impl local`` on a CPU, where all of it can be measured:
autograd's hooks, nothing left out (``tests/planning/cost/test_local_activations.py``). Here
attention is ours and keeps fp32 copies of queries, keys and values in a layout of its own, so that
recomputing the up-projections they come from would free nothing (``training/preflight.py`` refuses
it); SwiGLU outside the experts is a chain of operations that each keep their result, unless FP8
storage makes it one (``model/build.py``); a norm keeps fp32, and with bf16 weights its input in
fp32 as well.
"""

import functools
from collections.abc import Iterator

from megatron_k2.planning.cost.kept import Kept
from megatron_k2.planning.request import Recompute
from megatron_k2.presets import ModelPreset

FP32, INT64 = 4, 8


def local_rows(
    p: ModelPreset,
    tp: int,
    *,
    is_moe: bool,
    element_bytes: int = 2,
    is_swiglu_fused: bool = False,
) -> Iterator[Kept]:
    """One layer on one rank.

    Args:
        p: the model.
        tp: tensor-parallel ranks.
        is_moe: a layer with experts.
        element_bytes: of weights and activations: 2 in bf16, 4 in fp32.
        is_swiglu_fused: as with FP8 storage of activations.
    """
    swiglu = functools.partial(_swiglu_rows, element_bytes=element_bytes, is_fused=is_swiglu_fused)
    yield from _attention_rows(p, tp, element_bytes)
    yield from _norm_rows("MLP norm", p.hidden_size / tp, element_bytes, "norm")
    if not is_moe:
        yield from swiglu("dense", p.ffn_hidden_size / tp)
        return
    yield from _router_rows(p, tp)
    tokens = p.moe_router_topk / tp
    yield Kept("expert input", element_bytes * tokens * p.hidden_size, can_be_fp8=True)
    width = tokens * p.moe_ffn_hidden_size
    yield Kept("expert SwiGLU input", element_bytes * 2 * width, can_be_fp8=True)
    yield Kept("expert SwiGLU output", element_bytes * width, "swiglu")
    yield Kept("routing weights of the experts' tokens", FP32 * tokens)
    yield from swiglu("shared expert", p.moe_shared_expert_intermediate_size / tp)


def _attention_rows(p: ModelPreset, tp: int, element_bytes: int) -> Iterator[Kept]:
    heads = p.num_attention_heads // tp
    qk = p.qk_head_dim + p.qk_pos_emb_head_dim
    yield from _norm_rows("attention norm", p.hidden_size / tp, element_bytes, "norm")
    if p.q_lora_rank is not None:
        yield from _norm_rows("query latent", p.q_lora_rank, element_bytes)
    yield from _norm_rows("key-value latent", p.kv_lora_rank, element_bytes)
    yield Kept("rotary tables", 4.0 * element_bytes * p.qk_pos_emb_head_dim)
    yield Kept("query, scaled", FP32 * heads * qk)
    yield Kept("key", FP32 * heads * qk)
    yield Kept("value", FP32 * heads * p.v_head_dim)
    yield Kept("attention output by head", FP32 * heads * p.v_head_dim)
    yield Kept("softmax normaliser", FP32 * heads)
    yield Kept("attention output", element_bytes * heads * p.v_head_dim)


def _norm_rows(
    name: str, width: float, element_bytes: int, recompute: Recompute | None = None
) -> Iterator[Kept]:
    copies = 1 if element_bytes == FP32 else 2
    yield Kept(f"{name}, normalised in fp32", copies * FP32 * width, recompute)
    yield Kept(f"{name}, statistic", FP32, recompute)
    yield Kept(f"{name}, output", element_bytes * width, recompute)
    if recompute is not None:
        yield Kept(f"{name}, input", element_bytes * width, instead_of=recompute)


def _swiglu_rows(name: str, width: float, *, element_bytes: int, is_fused: bool) -> Iterator[Kept]:
    yield Kept(f"{name} gate and up", element_bytes * 2 * width, can_be_fp8=True)
    if not is_fused:
        yield Kept(f"{name} SwiGLU of the gate, and its sigmoid", element_bytes * 2 * width)
    yield Kept(f"{name} SwiGLU output", element_bytes * width)


def _router_rows(p: ModelPreset, tp: int) -> Iterator[Kept]:
    yield Kept("router scores, fp32, twice", 2.0 * FP32 * p.num_moe_experts / tp)
    yield Kept("order of the tokens", float(INT64) * p.num_moe_experts / tp)
    yield Kept("chosen experts and their weights", (3 * INT64 + FP32) * p.moe_router_topk / tp)
    yield Kept("sums of the weights", 2.0 * FP32 / tp)


def local_head_rows(p: ModelPreset, tp: int, element_bytes: int = 2) -> Iterator[Kept]:
    """Final norm, output head and loss, of the last stage; held for one micro-batch only."""
    yield from _norm_rows("final norm", p.hidden_size / tp, element_bytes)
    yield Kept("softmax over the vocabulary, fp32", FP32 * p.vocab_size / tp)
    yield Kept("labels and mask", INT64 + 1.0)
