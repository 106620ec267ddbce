"""Hugging Face name <-> Megatron name as reversible rules: data, not code paths.

One table, ``RULES``, holds for every kind of tensor its name on either side, the shape of one
Hugging Face tensor in the preset's dimensions, and a reversible operation. Everything else in this
package (audit, export, the in-memory conversions below) only replays that table, in one direction
or the other. Hugging Face names are the released ones (Kimi-K2-Instruct's index: experts, gate and
up are separate tensors); Megatron names are those of ``GPTModel.state_dict()`` with the local spec
at TP1/EP1/PP1. How a distributed checkpoint stores them is left to ``megatron_source``.

Facts the operations rest on:

- Rotary layout needs no permutation. DeepSeek stores the rotary rows of ``q_b_proj`` and
  ``kv_a_proj_with_mqa`` as interleaved pairs (x0, x1), (x2, x3), ...; Megatron 0.19.2's MLA expects
  the same: it calls ``apply_rotary_pos_emb(..., mla_rotary_interleaved=True)``
  (``multi_latent_attention.py:942``), which de-interleaves to (x[0::2], x[1::2]) before it rotates
  halves. ``config.rotary_interleaved`` must stay False: it would pair neighbours of the already
  de-interleaved halves. Proved by logits in ``tests/checkpoint/test_verify.py``.
- ``linear_q_up_proj`` is [heads x (nope, rope)] and ``linear_kv_up_proj`` [heads x (k nope, v)],
  row for row what Hugging Face has.
- ``linear_fc1`` is gate over up ([2F, H]); ``q_layernorm`` is ``q_a_layernorm``.
- The embedding and the head may be padded with rows at the end
  (``--make-vocab-size-divisible-by``); the padding never reaches Hugging Face.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_k2.errors import UserError
from megatron_k2.presets import ModelPreset

Shape = tuple[int, ...]
Scope = Literal["first_layer", "layer", "dense_layer", "moe_layer", "expert", "last_layer"]
"""Where a rule applies, and with which layer its tensors travel: K2's release keeps the embedding
with layer 0 and norm and head with the last, so those two scopes occur once each."""


class Operation(Protocol):
    """A reversible step between one Megatron tensor and the Hugging Face tensors it holds."""

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Megatron tensor -> Hugging Face tensors, as views."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Hugging Face tensors -> Megatron tensor."""

    def split_shape(self, shape: Shape) -> tuple[Shape, ...]:
        """``split`` on shapes alone."""

    def join_shape(self, shapes: Sequence[Shape]) -> Shape:
        """``join`` on shapes alone."""


class Identity:
    """One tensor, the same on both sides."""

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The tensor itself."""
        return (tensor,)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The only part."""
        (part,) = parts
        return part

    def split_shape(self, shape: Shape) -> tuple[Shape, ...]:
        """The shape itself."""
        return (shape,)

    def join_shape(self, shapes: Sequence[Shape]) -> Shape:
        """The only shape."""
        (shape,) = shapes
        return shape


class StackedRows:
    """Two tensors [F, H] one above the other in [2F, H]: a SwiGLU's gate over its up."""

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Upper and lower half."""
        return tensor.chunk(2)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """First part on top."""
        upper, lower = parts
        return torch.cat((upper, lower))

    def split_shape(self, shape: Shape) -> tuple[Shape, ...]:
        """Half the rows each; odd rows cannot be gate and up."""
        if shape[0] % 2:
            raise ValueError(f"fused gate and up need an even number of rows, got {shape}")
        half = (shape[0] // 2, *shape[1:])
        return (half, half)

    def join_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Rows add up; the rest must agree."""
        upper, lower = shapes
        if upper != lower:
            raise ValueError(f"gate {upper} and up {lower} differ in shape")
        return (upper[0] + lower[0], *upper[1:])


IDENTITY = Identity()
GATE_OVER_UP = StackedRows()


@dataclass(frozen=True)
class Rule:
    """One kind of tensor: its names, the shape of one Hugging Face tensor, the operation."""

    megatron: str
    hf: tuple[str, ...]
    dims: tuple[str, ...]
    """Shape of each Hugging Face tensor, in names of ``dimensions``."""
    scope: Scope = "layer"
    operation: Operation = IDENTITY
    has_q_lora: bool | None = None
    """Only where the query has (True) or lacks (False) a down-projection; None: always."""
    is_fp32: bool = False
    """Kept in fp32 whatever dtype the weights get: the router's selection bias moves in steps of
    1e-3, which bf16 cannot hold at a magnitude of 1."""

    @property
    def is_vocabulary(self) -> bool:
        """Whether Megatron may hold padding rows beyond the preset's vocabulary."""
        return self.dims[0] == "vocab_size"


_MEG_LAYER, _HF_LAYER = "decoder.layers.{layer}.", "model.layers.{layer}."
_MEG_ATTENTION, _HF_ATTENTION = _MEG_LAYER + "self_attention.", _HF_LAYER + "self_attn."
_MEG_MLP, _HF_MLP = _MEG_LAYER + "mlp.", _HF_LAYER + "mlp."


def _attention(megatron: str, hf: str, *dims: str, has_q_lora: bool | None = None) -> Rule:
    meg_name, hf_name = f"{_MEG_ATTENTION}{megatron}.weight", f"{_HF_ATTENTION}{hf}.weight"
    return Rule(meg_name, (hf_name,), dims, has_q_lora=has_q_lora)


def _swiglu(scope: Scope, megatron: str, hf: str, width: str) -> tuple[Rule, Rule]:
    gate_and_up = (f"{_HF_MLP}{hf}gate_proj.weight", f"{_HF_MLP}{hf}up_proj.weight")
    fc1, fc2 = (f"{_MEG_MLP}{megatron}linear_fc{i}.weight" for i in (1, 2))
    return (
        Rule(fc1, gate_and_up, (width, "hidden_size"), scope, GATE_OVER_UP),
        Rule(fc2, (f"{_HF_MLP}{hf}down_proj.weight",), ("hidden_size", width), scope),
    )


RULES: tuple[Rule, ...] = (
    Rule(
        "embedding.word_embeddings.weight",
        ("model.embed_tokens.weight",),
        ("vocab_size", "hidden_size"),
        "first_layer",
    ),
    Rule(
        _MEG_LAYER + "input_layernorm.weight",
        (_HF_LAYER + "input_layernorm.weight",),
        ("hidden_size",),
    ),
    _attention("linear_q_proj", "q_proj", "query_rows", "hidden_size", has_q_lora=False),
    _attention("linear_q_down_proj", "q_a_proj", "q_lora_rank", "hidden_size", has_q_lora=True),
    _attention("q_layernorm", "q_a_layernorm", "q_lora_rank", has_q_lora=True),
    _attention("linear_q_up_proj", "q_b_proj", "query_rows", "q_lora_rank", has_q_lora=True),
    _attention("linear_kv_down_proj", "kv_a_proj_with_mqa", "kv_down_rows", "hidden_size"),
    _attention("kv_layernorm", "kv_a_layernorm", "kv_lora_rank"),
    _attention("linear_kv_up_proj", "kv_b_proj", "kv_up_rows", "kv_lora_rank"),
    _attention("linear_proj", "o_proj", "hidden_size", "value_columns"),
    Rule(
        _MEG_LAYER + "pre_mlp_layernorm.weight",
        (_HF_LAYER + "post_attention_layernorm.weight",),
        ("hidden_size",),
    ),
    *_swiglu("dense_layer", "", "", "ffn_hidden_size"),
    Rule(
        _MEG_MLP + "router.weight",
        (_HF_MLP + "gate.weight",),
        ("num_moe_experts", "hidden_size"),
        "moe_layer",
    ),
    Rule(
        _MEG_MLP + "router.expert_bias",
        (_HF_MLP + "gate.e_score_correction_bias",),
        ("num_moe_experts",),
        "moe_layer",
        is_fp32=True,
    ),
    *_swiglu(
        "expert", "experts.local_experts.{expert}.", "experts.{expert}.", "moe_ffn_hidden_size"
    ),
    *_swiglu(
        "moe_layer", "shared_experts.", "shared_experts.", "moe_shared_expert_intermediate_size"
    ),
    Rule(
        "decoder.final_layernorm.weight",
        ("model.norm.weight",),
        ("hidden_size",),
        "last_layer",
    ),
    Rule(
        "output_layer.weight",
        ("lm_head.weight",),
        ("vocab_size", "hidden_size"),
        "last_layer",
    ),
)

IGNORED_HF_SUFFIXES = ("rotary_emb.inv_freq",)
"""Buffers some releases carry that no model reads; K2's has the size of the wrong head."""


@dataclass(frozen=True)
class Pair:
    """One rule at one place: a Megatron tensor and the Hugging Face tensors it becomes."""

    rule: Rule
    layer: int
    """From 0; for the embedding, norm and head the layer they travel with."""
    megatron: str
    hf: tuple[str, ...]
    megatron_shape: Shape
    """Without vocabulary padding."""
    hf_shapes: tuple[Shape, ...]
    expert: int | None = None
    """From 0; None for a tensor that belongs to no routed expert."""

    @property
    def num_elements(self) -> int:
        """Of the Megatron tensor, without vocabulary padding."""
        return math.prod(self.megatron_shape)

    def parts(self) -> Iterator[tuple[str, Shape, int]]:
        """Name and shape of each Hugging Face tensor, and its first row in the Megatron tensor.

        Every operation of the table stacks rows, so a part's rows are a run of the whole's; that
        is what lets both directions stream row chunks.
        """
        begin = 0
        for name, shape in zip(self.hf, self.hf_shapes, strict=True):
            yield name, shape, begin
            begin += shape[0]


def dimensions(preset: ModelPreset) -> dict[str, int]:
    """The sizes ``Rule.dims`` speaks of, in elements."""
    p, heads = preset, preset.num_attention_heads
    return {
        "vocab_size": p.vocab_size,
        "hidden_size": p.hidden_size,
        "ffn_hidden_size": p.ffn_hidden_size,
        "q_lora_rank": p.q_lora_rank or 0,
        "kv_lora_rank": p.kv_lora_rank,
        "query_rows": heads * (p.qk_head_dim + p.qk_pos_emb_head_dim),
        "kv_down_rows": p.kv_lora_rank + p.qk_pos_emb_head_dim,
        "kv_up_rows": heads * (p.qk_head_dim + p.v_head_dim),
        "value_columns": heads * p.v_head_dim,
        "num_moe_experts": p.num_moe_experts,
        "moe_ffn_hidden_size": p.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": p.moe_shared_expert_intermediate_size,
    }


def _applies(rule: Rule, preset: ModelPreset, layer: int) -> bool:
    if rule.has_q_lora is not None and rule.has_q_lora != (preset.q_lora_rank is not None):
        return False
    is_dense = layer < preset.num_dense_layers
    return {
        "first_layer": layer == 0,
        "layer": True,
        "dense_layer": is_dense,
        "moe_layer": not is_dense,
        "expert": not is_dense,
        "last_layer": layer == preset.num_layers - 1,
    }[rule.scope]


def expand(preset: ModelPreset, rules: Sequence[Rule] = RULES) -> Iterator[Pair]:
    """Every tensor of ``preset`` once, layer by layer: names and shapes, no data.

    Within a layer the order is the table's; experts follow one another. K2's 69,975 Hugging Face
    names take 0.3 s.
    """
    sizes = dimensions(preset)
    for layer in range(preset.num_layers):
        for rule in rules:
            if not _applies(rule, preset, layer):
                continue
            shapes = (tuple(sizes[dim] for dim in rule.dims),) * len(rule.hf)
            joined = rule.operation.join_shape(shapes)
            experts = range(preset.num_moe_experts) if rule.scope == "expert" else (0,)
            for expert in experts:
                hf = tuple(name.format(layer=layer, expert=expert) for name in rule.hf)
                megatron = rule.megatron.format(layer=layer, expert=expert)
                at = expert if rule.scope == "expert" else None
                yield Pair(rule, layer, megatron, hf, joined, shapes, at)


def _take(state: Mapping[str, Tensor], name: str, side: str) -> Tensor:
    if name not in state:
        raise UserError(f"{side} state has no '{name}', which the preset calls for")
    return state[name]


def _expect_shape(name: str, tensor: Tensor, shape: Shape) -> None:
    if tuple(tensor.shape) != shape:
        raise UserError(
            f"'{name}' has shape {list(tensor.shape)}, the preset expects {list(shape)}"
        )


def _expect_consumed(left: set[str], side: str) -> None:
    if left:
        first = ", ".join(sorted(left)[:3])
        raise UserError(f"{len(left)} {side} tensors have no place in the preset: {first}")


def hf_state_to_megatron(
    hf_state: Mapping[str, Tensor], preset: ModelPreset, padded_vocab_size: int | None = None
) -> dict[str, Tensor]:
    """A whole Hugging Face state dict as ``GPTModel.state_dict()`` at TP1/EP1/PP1.

    Args:
        hf_state: released ("classic") names; for transformers 5 in memory see
            ``classic_from_transformers``.
        preset: the shape; every key must be one it calls for.
        padded_vocab_size: rows of the Megatron embedding and head; the padding is zeros.
            Default: no padding.

    Returns:
        Megatron name -> tensor, dtypes unchanged; identity rules share memory with the input.

    Raises:
        UserError: naming the missing, unknown or misshapen tensor.
    """
    result: dict[str, Tensor] = {}
    left = {name for name in hf_state if not name.endswith(IGNORED_HF_SUFFIXES)}
    for pair in expand(preset):
        parts = [_take(hf_state, name, "Hugging Face") for name in pair.hf]
        for name, part, shape in zip(pair.hf, parts, pair.hf_shapes, strict=True):
            _expect_shape(name, part, shape)
        left.difference_update(pair.hf)
        tensor = pair.rule.operation.join(parts)
        if pair.rule.is_vocabulary and padded_vocab_size is not None:
            padding = padded_vocab_size - preset.vocab_size
            tensor = torch.nn.functional.pad(tensor, (0, 0, 0, padding))
        result[pair.megatron] = tensor
    _expect_consumed(left, "Hugging Face")
    return result


def megatron_state_to_hf(
    megatron_state: Mapping[str, Tensor | None], preset: ModelPreset
) -> dict[str, Tensor]:
    """``GPTModel.state_dict()`` at TP1/EP1/PP1 as a Hugging Face state dict, classic names.

    Vocabulary padding is cut; ``_extra_state`` entries (no weights) are passed over. dtypes are
    unchanged, and what comes back are views of the input.

    Raises:
        UserError: naming the missing, unknown or misshapen tensor.
    """
    tensors = {
        k: v for k, v in megatron_state.items() if v is not None and not k.endswith("_extra_state")
    }
    result: dict[str, Tensor] = {}
    left = set(tensors)
    for pair in expand(preset):
        tensor = _take(tensors, pair.megatron, "Megatron")
        if pair.rule.is_vocabulary:
            tensor = tensor[: preset.vocab_size]
        _expect_shape(pair.megatron, tensor, pair.megatron_shape)
        left.discard(pair.megatron)
        result.update(zip(pair.hf, pair.rule.operation.split(tensor), strict=True))
    _expect_consumed(left, "Megatron")
    return result


def classic_from_transformers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Transformers 5's in-memory ``DeepseekV3ForCausalLM.state_dict()`` under the released names.

    In memory it fuses a layer's experts, ``mlp.experts.gate_up_proj`` [e, 2F, H] (gate first) and
    ``mlp.experts.down_proj`` [e, H, F]; on disk, as in every release, they are apart.
    """
    classic: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        prefix, is_fused, matrix = name.rpartition("mlp.experts.")
        if not is_fused or matrix not in ("gate_up_proj", "down_proj"):
            classic[name] = tensor
            continue
        for expert, weight in enumerate(tensor.unbind()):
            at = f"{prefix}mlp.experts.{expert}."
            if matrix == "down_proj":
                classic[f"{at}down_proj.weight"] = weight
            else:
                gate, up = GATE_OVER_UP.split(weight)
                classic[f"{at}gate_proj.weight"], classic[f"{at}up_proj.weight"] = gate, up
    return classic
