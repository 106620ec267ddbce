"""The table: Hugging Face name <-> Megatron name, one rule for every kind of tensor.

Hugging Face names are the released ones (Kimi-K2-Instruct's and DeepSeek-V3's index: experts, gate
and up are separate tensors); Megatron names are those of ``GPTModel.state_dict()`` with the local
spec at TP1/EP1/PP1. How a distributed checkpoint stores them is left to ``megatron_keys``.

Facts the operations rest on:

- Rotary layout needs no permutation. DeepSeek stores the rotary rows of ``q_b_proj`` and
  ``kv_a_proj_with_mqa`` as interleaved pairs (x0, x1), (x2, x3), ...; Megatron 0.19.2's MLA expects
  the same: it calls ``apply_rotary_pos_emb(..., mla_rotary_interleaved=True)``
  (``multi_latent_attention.py:942``), which de-interleaves to (x[0::2], x[1::2]) before it rotates
  halves. ``config.rotary_interleaved`` must stay False: it would pair neighbours of the already
  de-interleaved halves. Proved by logits in ``tests/checkpoint/verify/test_against_reference.py``.
- ``linear_q_up_proj`` is [heads x (nope, rope)] and ``linear_kv_up_proj`` [heads x (k nope, v)],
  row for row what Hugging Face has.
- ``linear_fc1`` is gate over up ([2F, H]); ``q_layernorm`` is ``q_a_layernorm``.
- The embedding and the head may be padded with rows at the end
  (``--make-vocab-size-divisible-by``); the padding never reaches Hugging Face.
- A prediction layer (MTP; DeepSeek-V3's layer 61, none in K2) is a decoder layer behind a
  projection. Both sides put the embedding before the hidden state in ``eh_proj``'s columns
  (``multi_token_prediction.py:1138``). Releases repeat embedding and head in it, which Megatron
  shares with the model: copies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
Scope = Literal[
    "first_layer", "layer", "dense_layer", "moe_layer", "expert", "last_layer", "mtp_layer"
]
"""Where a rule applies, and with which layer its tensors travel: K2's release keeps the embedding
with layer 0 and norm and head with the last, so those two scopes occur once each. Rules of a
"layer" and its FFN hold in prediction layers too; "mtp_layer" is what those have besides."""


class Operation(Protocol):
    """A reversible step between one Megatron tensor and the Hugging Face tensors it holds."""

    def split(self, tensor: "Tensor") -> "tuple[Tensor, ...]":
        """Megatron tensor -> Hugging Face tensors, as views."""

    def join(self, parts: "Sequence[Tensor]") -> "Tensor":
        """Hugging Face tensors -> Megatron tensor."""

    def split_shape(self, shape: Shape) -> tuple[Shape, ...]:
        """The shapes that ``split`` gives for a tensor of ``shape``."""

    def join_shape(self, shapes: Sequence[Shape]) -> Shape:
        """The shape that ``join`` gives for parts of ``shapes``."""


class Identity:
    """One tensor, the same on both sides."""

    def split(self, tensor: "Tensor") -> "tuple[Tensor, ...]":
        """The tensor itself, as the only part."""
        return (tensor,)

    def join(self, parts: "Sequence[Tensor]") -> "Tensor":
        """The only part of ``parts``, unchanged."""
        (part,) = parts
        return part

    def split_shape(self, shape: Shape) -> tuple[Shape, ...]:
        """The shape itself, of the only part."""
        return (shape,)

    def join_shape(self, shapes: Sequence[Shape]) -> Shape:
        """The shape of the only part."""
        (shape,) = shapes
        return shape


class StackedRows:
    """Two tensors [F, H] one above the other in [2F, H]: a SwiGLU's gate over its up."""

    def split(self, tensor: "Tensor") -> "tuple[Tensor, ...]":
        """Gate [F, H] and up [F, H], views of the upper and lower half."""
        return tensor.chunk(2)

    def join(self, parts: "Sequence[Tensor]") -> "Tensor":
        """[2F, H] with the first part on top."""
        import torch

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
    megatron_te: str | None = None
    """Its name within a layer of Transformer Engine modules, where that differs: they fuse a norm
    into the linear layer behind it."""
    is_copy: bool = False
    """The Hugging Face tensor repeats one of another rule: compared on the way in, written on the
    way out."""

    @property
    def megatron_in_mtp(self) -> str:
        """The Megatron name in a prediction layer, where {layer} counts those from 0."""
        return self.megatron.replace(_MEG_LAYER, _MEG_MTP + "mtp_model_layer.")

    @property
    def is_vocabulary(self) -> bool:
        """Whether Megatron may hold padding rows beyond the preset's vocabulary."""
        return self.dims[0] == "vocab_size"


_MEG_LAYER, _HF_LAYER = "decoder.layers.{layer}.", "model.layers.{layer}."
_MEG_MTP = "mtp.layers.{layer}."
_MEG_ATTENTION, _HF_ATTENTION = _MEG_LAYER + "self_attention.", _HF_LAYER + "self_attn."
_MEG_MLP, _HF_MLP = _MEG_LAYER + "mlp.", _HF_LAYER + "mlp."


def _attention(
    megatron: str, hf: str, *dims: str, has_q_lora: bool | None = None, te: str | None = None
) -> Rule:
    meg_name, hf_name = f"{_MEG_ATTENTION}{megatron}.weight", f"{_HF_ATTENTION}{hf}.weight"
    fused = te and f"self_attention.{te}.layer_norm_weight"
    return Rule(meg_name, (hf_name,), dims, has_q_lora=has_q_lora, megatron_te=fused)


def _pre_mlp_norm(scope: Scope, te: str | None = None) -> Rule:
    names = (f"{_HF_LAYER}post_attention_layernorm.weight",)
    megatron = f"{_MEG_LAYER}pre_mlp_layernorm.weight"
    return Rule(megatron, names, ("hidden_size",), scope, megatron_te=te)


def _mtp(megatron: str, hf: str, *dims: str) -> Rule:
    name = f"{_MEG_MTP}{megatron}.weight"
    return Rule(name, (f"{_HF_LAYER}{hf}.weight",), dims, "mtp_layer")


def _mtp_copy(megatron: str, hf: str) -> Rule:
    dims = ("vocab_size", "hidden_size")
    return Rule(megatron, (f"{_HF_LAYER}{hf}.weight",), dims, "mtp_layer", is_copy=True)


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
    _attention(
        "q_layernorm", "q_a_layernorm", "q_lora_rank", has_q_lora=True, te="linear_q_up_proj"
    ),
    _attention("linear_q_up_proj", "q_b_proj", "query_rows", "q_lora_rank", has_q_lora=True),
    _attention("linear_kv_down_proj", "kv_a_proj_with_mqa", "kv_down_rows", "hidden_size"),
    _attention("kv_layernorm", "kv_a_layernorm", "kv_lora_rank", te="linear_kv_up_proj"),
    _attention("linear_kv_up_proj", "kv_b_proj", "kv_up_rows", "kv_lora_rank"),
    _attention("linear_proj", "o_proj", "hidden_size", "value_columns"),
    _pre_mlp_norm("dense_layer", te="mlp.linear_fc1.layer_norm_weight"),
    _pre_mlp_norm("moe_layer"),
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
    _mtp("enorm", "enorm", "hidden_size"),
    _mtp("hnorm", "hnorm", "hidden_size"),
    _mtp("eh_proj", "eh_proj", "hidden_size", "twice_hidden_size"),
    _mtp("final_layernorm", "shared_head.norm", "hidden_size"),
    _mtp_copy("embedding.word_embeddings.weight", "embed_tokens"),
    _mtp_copy("output_layer.weight", "shared_head.head"),
)

IGNORED_HF_SUFFIXES = ("rotary_emb.inv_freq",)
"""Buffers some releases carry that no model reads; K2's has the size of the wrong head."""
