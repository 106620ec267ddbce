"""The rules of ``rules`` applied to a model: every tensor's pair of names, and whole state dicts.

Everything else in this package (audit, import, export) only replays ``expand``, in one direction or
the other. The in-memory conversions here do so for models that fit.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_k2.checkpoint.names.rules import (
    GATE_OVER_UP,
    IGNORED_HF_SUFFIXES,
    RULES,
    Rule,
    Shape,
)
from megatron_k2.errors import UserError
from megatron_k2.presets import ModelPreset

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """One rule at one place: a Megatron tensor and the Hugging Face tensors it becomes."""

    rule: Rule
    layer: int
    """From 0; for the embedding, norm and head the layer they travel with; prediction layers
    follow the others, as in Hugging Face names."""
    megatron: str
    hf: tuple[str, ...]
    megatron_shape: Shape
    """Without vocabulary padding."""
    hf_shapes: tuple[Shape, ...]
    expert: int | None = None
    """From 0; None for a tensor that belongs to no routed expert."""

    @property
    def num_elements(self) -> int:
        """Elements of the Megatron tensor, without vocabulary padding."""
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
        "twice_hidden_size": 2 * p.hidden_size,
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
    # a prediction layer's FFN is of the last layer's kind
    is_dense = min(layer, preset.num_layers - 1) < preset.num_dense_layers
    return {
        "first_layer": layer == 0,
        "layer": True,
        "dense_layer": is_dense,
        "moe_layer": not is_dense,
        "expert": not is_dense,
        "last_layer": layer == preset.num_layers - 1,
        "mtp_layer": layer >= preset.num_layers,
    }[rule.scope]


def expand(preset: ModelPreset, rules: Sequence[Rule] = RULES) -> Iterator[Pair]:
    """Every tensor of ``preset`` once, layer by layer: names and shapes, no data.

    Within a layer the order is the table's; experts follow one another. K2's 69,975 Hugging Face
    names take 0.3 s.
    """
    sizes = dimensions(preset)
    for layer in range(preset.num_layers + preset.num_mtp_layers):
        mtp_layer = layer - preset.num_layers
        for rule in rules:
            if not _applies(rule, preset, layer):
                continue
            is_mtp = mtp_layer >= 0
            template = rule.megatron_in_mtp if is_mtp else rule.megatron
            shapes = (tuple(sizes[dim] for dim in rule.dims),) * len(rule.hf)
            joined = rule.operation.join_shape(shapes)
            experts = range(preset.num_moe_experts) if rule.scope == "expert" else (0,)
            for expert in experts:
                hf = tuple(name.format(layer=layer, expert=expert) for name in rule.hf)
                megatron = template.format(layer=mtp_layer if is_mtp else layer, expert=expert)
                at = expert if rule.scope == "expert" else None
                yield Pair(rule, layer, megatron, hf, joined, shapes, at)


def _take(state: "Mapping[str, Tensor]", name: str, side: str) -> "Tensor":
    if name not in state:
        raise UserError(f"{side} state has no '{name}', which the preset calls for")
    return state[name]


def _expect_shape(name: str, tensor: "Tensor", shape: Shape) -> None:
    if tuple(tensor.shape) != shape:
        raise UserError(
            f"'{name}' has shape {list(tensor.shape)}, the preset expects {list(shape)}"
        )


def _expect_copy(pair: Pair, tensor: "Tensor", original: "Tensor") -> None:
    if not tensor.equal(original[: len(tensor)]):
        raise UserError(f"'{pair.hf[0]}' is not the model's own, which Megatron shares with it")


def _expect_consumed(left: set[str], side: str) -> None:
    if left:
        first = ", ".join(sorted(left)[:3])
        raise UserError(f"{len(left)} {side} tensors have no place in the preset: {first}")


def hf_state_to_megatron(
    hf_state: "Mapping[str, Tensor]", preset: ModelPreset, padded_vocab_size: int | None = None
) -> "dict[str, Tensor]":
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
    import torch

    result: dict[str, Tensor] = {}
    left = {name for name in hf_state if not name.endswith(IGNORED_HF_SUFFIXES)}
    for pair in expand(preset):
        parts = [_take(hf_state, name, "Hugging Face") for name in pair.hf]
        for name, part, shape in zip(pair.hf, parts, pair.hf_shapes, strict=True):
            _expect_shape(name, part, shape)
        left.difference_update(pair.hf)
        tensor = pair.rule.operation.join(parts)
        if pair.rule.is_copy:
            _expect_copy(pair, tensor, result[pair.megatron])
            continue
        if pair.rule.is_vocabulary and padded_vocab_size is not None:
            padding = padded_vocab_size - preset.vocab_size
            tensor = torch.nn.functional.pad(tensor, (0, 0, 0, padding))
        result[pair.megatron] = tensor
    _expect_consumed(left, "Hugging Face")
    return result


def megatron_state_to_hf(
    megatron_state: "Mapping[str, Tensor | None]", preset: ModelPreset
) -> "dict[str, Tensor]":
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


def classic_from_transformers(state_dict: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
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
