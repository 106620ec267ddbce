"""Weights of the embedded engine: Hugging Face's tensors, each written into its place.

Places are views of a few fused tensors: ``load`` at the start and an update under a running engine
are the same copy, and nothing is held twice.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from megatron_k2.errors import UserError
from megatron_k2.presets import ModelPreset


@dataclass
class Attention:
    """MLA of one layer. h hidden, H heads, q and c latent widths, n, r, v widths of a head."""

    down: Tensor
    """[q + c + r, h]: query latent, key-value latent and the shared rotary key in one product;
    without a query latent [H (n + r) + c + r, h]."""
    query_norm: Tensor | None
    """[q]"""
    query_up: Tensor | None
    """[H (n + r), q]"""
    latent_norm: Tensor
    """[c]"""
    latent_up: Tensor
    """[H (n + v), c]"""
    output: Tensor
    """[h, H v]"""


@dataclass
class Experts:
    """Routed experts. E experts of width f."""

    router: Tensor
    """[E, h] fp32"""
    bias: Tensor
    """[E] fp32: added for the choice alone."""
    up: Tensor
    """[E, 2 f, h]: gate, then up."""
    down: Tensor
    """[E, h, f]"""


@dataclass
class Layer:
    """One layer; ``up`` and ``down`` are the dense SwiGLU's, or the shared experts'."""

    attention_norm: Tensor
    attention: Attention
    mlp_norm: Tensor
    up: Tensor
    """[2 f, h]: gate, then up."""
    down: Tensor
    """[h, f]"""
    experts: Experts | None


class Weights:
    """All weights on one device.

    Args:
        preset: the model's shape; prediction layers are left out.
        dtype: of every matrix and norm; routers and their biases are fp32.
        device: where they lie.
        expert_groups: into how many groups experts are parted, and how many of them a token may
            use; K2 has none.
        folder: of files that hold the weights, mapped: written by one process, read by several.
            On a CPU alone; without it the weights are this process's own.
    """

    def __init__(
        self,
        preset: ModelPreset,
        dtype: torch.dtype,
        device: torch.device,
        expert_groups: tuple[int, int] = (1, 1),
        folder: Path | None = None,
    ) -> None:
        self.preset, self.dtype, self.device = preset, dtype, device
        self.expert_groups = expert_groups
        self._places: dict[str, Tensor] = {}
        self._folder, self._num_files = folder, 0
        p = preset
        self.embedding = self._new("model.embed_tokens.weight", p.vocab_size, p.hidden_size)
        self.layers = [self._layer(number) for number in range(p.num_layers)]
        self.norm = self._new("model.norm.weight", p.hidden_size)
        self.head = self._new("lm_head.weight", p.vocab_size, p.hidden_size)

    @property
    def num_bytes(self) -> int:
        """Of all weights."""
        return sum(place.numel() * place.element_size() for place in self._places.values())

    @property
    def held(self) -> Mapping[str, Tensor]:
        """Every weight by Hugging Face's name, as it lies here: to be read, not written."""
        return MappingProxyType(self._places)

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        if self._folder is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        path = self._folder / f"{self._num_files}.bin"
        self._num_files += 1
        size = math.prod(shape)
        return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)

    def _new(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        self._places[name] = self._empty(*shape, dtype=dtype)
        return self._places[name]

    def _fused(self, width: int, parts: Iterable[tuple[str, int]]) -> Tensor:
        """Matrices [rows, width] one under another, each with a place of its own."""
        parts = list(parts)
        whole = self._empty(sum(rows for _, rows in parts), width)
        for (name, _), place in zip(parts, whole.split([n for _, n in parts]), strict=True):
            self._places[name] = place
        return whole

    def _layer(self, number: int) -> Layer:
        p, prefix = self.preset, f"model.layers.{number}."
        mlp, shared = f"{prefix}mlp.", f"{prefix}mlp.shared_experts."
        is_dense = number < p.num_dense_layers
        width = p.ffn_hidden_size if is_dense else p.moe_shared_expert_intermediate_size
        up, down = self._swiglu(mlp if is_dense else shared, width)
        return Layer(
            self._new(f"{prefix}input_layernorm.weight", p.hidden_size),
            self._attention(f"{prefix}self_attn."),
            self._new(f"{prefix}post_attention_layernorm.weight", p.hidden_size),
            up,
            down,
            None if is_dense else self._experts(mlp),
        )

    def _attention(self, prefix: str) -> Attention:
        p = self.preset
        h, heads, c, q = p.hidden_size, p.num_attention_heads, p.kv_lora_rank, p.q_lora_rank
        head, r = p.qk_head_dim + p.qk_pos_emb_head_dim, p.qk_pos_emb_head_dim
        first = ("q_proj", heads * head) if q is None else ("q_a_proj", q)
        rows = [first, ("kv_a_proj_with_mqa", c + r)]
        new = self._new
        return Attention(
            self._fused(h, [(f"{prefix}{name}.weight", n) for name, n in rows]),
            None if q is None else new(f"{prefix}q_a_layernorm.weight", q),
            None if q is None else new(f"{prefix}q_b_proj.weight", heads * head, q),
            new(f"{prefix}kv_a_layernorm.weight", c),
            new(f"{prefix}kv_b_proj.weight", heads * (p.qk_head_dim + p.v_head_dim), c),
            new(f"{prefix}o_proj.weight", h, heads * p.v_head_dim),
        )

    def _swiglu(self, prefix: str, width: int) -> tuple[Tensor, Tensor]:
        h = self.preset.hidden_size
        names = [(f"{prefix}{name}_proj.weight", width) for name in ("gate", "up")]
        return self._fused(h, names), self._new(f"{prefix}down_proj.weight", h, width)

    def _experts(self, prefix: str) -> Experts:
        p = self.preset
        count, h, f = p.num_moe_experts, p.hidden_size, p.moe_ffn_hidden_size
        up, down = self._empty(count, 2 * f, h), self._empty(count, h, f)
        for expert in range(count):
            own = f"{prefix}experts.{expert}."
            self._places[f"{own}gate_proj.weight"] = up[expert, :f]
            self._places[f"{own}up_proj.weight"] = up[expert, f:]
            self._places[f"{own}down_proj.weight"] = down[expert]
        fp32 = torch.float32
        return Experts(
            self._new(f"{prefix}gate.weight", count, h, dtype=fp32),
            self._new(f"{prefix}gate.e_score_correction_bias", count, dtype=fp32),
            up,
            down,
        )

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write every weight, as it comes.

        Args:
            tensors: Hugging Face's names and tensors of any float dtype, in any order. Those of
                prediction layers are passed over.

        Raises:
            UserError: one is unknown, came twice, has another shape, or never came. The weights are
                then a mixture, and must not be used until all of them have been loaded.
        """
        open_places = dict(self._places)
        layers = range(
            self.preset.num_layers, self.preset.num_layers + max(1, self.preset.num_mtp_layers)
        )
        beyond = tuple(f"model.layers.{layer}." for layer in layers)
        for name, tensor in tensors:
            if name.startswith(beyond):
                continue
            place = open_places.pop(name, None)
            if place is None:
                what = "came twice" if name in self._places else "is no weight of this model"
                raise UserError(f"weight '{name}' {what}")
            if tensor.shape != place.shape:
                raise UserError(
                    f"weight '{name}' is {list(tensor.shape)}, this model's is {list(place.shape)}"
                )
            place.copy_(tensor)
        if open_places:
            raise UserError(
                f"{len(open_places):,} weights never came, '{next(iter(open_places))}' among them"
            )
