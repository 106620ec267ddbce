"""The forward pass whose every row is a function of its own tokens alone, to the bit.

Whatever else is in a step, in chunks of whatever sizes a prompt is read, whether its rows were
computed, copied from another's, or come back as the prompt of an answer that is continued: a row
goes through the same products, in the same order of sums. Reading and decoding differ only in how
many rows are computed at once, which ``tiles`` keeps out of the bits.

Attention is absorbed for every row, and goes by tiles of ``KEYS`` cached tokens, counted from the
first: a tile's product has one shape, and tiles behind a row's own position add exact zeros.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_k2.engine.local import tiles
from megatron_k2.engine.local.experts import Dispatch
from megatron_k2.engine.local.model import Chunk, LatentModel, Rows, Step
from megatron_k2.engine.local.weights import Attention, Experts, Weights

KEYS = 128
"""Cached tokens of a tile."""


def whole_tiles(length: int) -> int:
    """``length`` tokens, and those that fill the last tile."""
    return -(-length // KEYS) * KEYS


class InvariantModel(LatentModel):
    """See the module.

    Args:
        weights: of the model.
        num_slots: sequences at once.
        length: tokens of each; rounded up to whole tiles.

    Raises:
        UserError: this machine's products depend on a row's place.
    """

    def __init__(self, weights: Weights, num_slots: int, length: int) -> None:
        super().__init__(weights, num_slots, whole_tiles(length))
        self._products = tiles.Products()
        token = torch.zeros(1, dtype=torch.long, device=weights.device)
        # Every shape of product is tried now: by a row that is read, and one that decodes.
        self.logits(self.forward(token, Step((), (), (Chunk(0, 0, 1),))))
        self.forward(token, Step((0,), (1,)))

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._products.rows(x, weight)

    def _norm(self, x: Tensor, weight: Tensor, epsilon: float | None = None) -> Tensor:
        eps = self._preset.norm_epsilon if epsilon is None else epsilon
        wide = x.float()
        mean = tiles.total(wide * wide) / x.shape[-1]
        return (wide / (mean + eps).sqrt()).to(x.dtype) * weight

    def _swiglu(self, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        gate, value = self._linear(x, up).chunk(2, -1)
        return self._linear(tiles.elementwise(F.silu, gate) * value, down)

    def _scores(self, experts: Experts, x: Tensor) -> Tensor:
        return tiles.elementwise(torch.sigmoid, self._linear(x.float(), experts.router))

    def _share_total(self, shares: Tensor) -> Tensor:
        return tiles.total(shares)

    def _routed_sum(self, experts: Experts, x: Tensor, dispatch: Dispatch) -> Tensor:
        parts = dispatch.sent(x).split(dispatch.counts.tolist())
        found = [
            self._swiglu(part, experts.up[expert], experts.down[expert])
            for expert, part in enumerate(parts)
            if len(part)
        ]
        first, *others = dispatch.by_row(torch.cat(found)).unbind(1)
        for other in others:
            first = first + other
        return first

    def _attended(
        self, a: Attention, query: Tensor, rotary: Tensor, cache: Tensor, rows: Rows
    ) -> Tensor:
        p, num_decoding = self._preset, len(rows.step.slots)
        heads, c, n, v = p.num_attention_heads, p.kv_lora_rank, p.qk_head_dim, p.v_head_dim
        up = a.latent_up.view(heads, n + v, c)
        moved = self._products.heads(query.transpose(0, 1), up[:, :n]).transpose(0, 1)
        whole = torch.cat([moved, rotary], -1)
        parts, begin = [], num_decoding
        if num_decoding:
            here = slice(0, num_decoding)
            parts.append(self._mixed_apart(whole[here], cache, rows.slots[here], rows))
        for chunk in rows.step.chunks:
            here = slice(begin, begin + chunk.count)
            parts.append(self._mixed_chunk(whole[here], cache[chunk.slot], chunk, rows, here))
            begin += chunk.count
        mixed = torch.cat(parts).transpose(0, 1)
        values = self._products.heads(mixed, up[:, n:].transpose(1, 2))
        return values.transpose(0, 1).reshape(len(query), heads * v)

    def _mixed_apart(self, whole: Tensor, cache: Tensor, slots: Tensor, rows: Rows) -> Tensor:
        """Rows of as many sequences against their own latents, [D, H, c]."""
        count, heads, width = whole.shape
        c, num_tiles = self._preset.kv_lora_rank, -(-(max(rows.step.positions) + 1) // KEYS)
        seen = cache[slots, : num_tiles * KEYS].view(count * num_tiles, KEYS, width)
        own = whole[:, None].expand(-1, num_tiles, -1, -1).reshape(-1, heads, width)
        logits = self._products.pairs(own, seen.transpose(1, 2))
        logits = logits.view(count, num_tiles, heads, KEYS)
        probs, sums = self._weights(logits, rows.positions[:count])
        own = probs.to(whole.dtype).view(count * num_tiles, heads, KEYS)
        mixed = self._products.pairs(own, seen[..., :c]).view(count, num_tiles, heads, c)
        return self._settled(list(mixed.unbind(1)), sums).to(whole.dtype)

    def _mixed_chunk(
        self, whole: Tensor, cache: Tensor, chunk: Chunk, rows: Rows, here: slice
    ) -> Tensor:
        """Rows of one sequence, [q, H, c]; ``cache`` [length, c + r] is its slot."""
        count, heads, _ = whole.shape
        c, num_tiles = self._preset.kv_lora_rank, -(-(chunk.start + count) // KEYS)
        seen, flat = cache[: num_tiles * KEYS].split(KEYS), whole.flatten(0, 1)
        logits = torch.stack(
            [self._products.rows(flat, tile).view(count, heads, KEYS) for tile in seen], 1
        )
        probs, sums = self._weights(logits, rows.positions[here])
        parts = [
            self._products.rows(p.to(whole.dtype).flatten(0, 1), tile[:, :c].t())
            for p, tile in zip(probs.unbind(1), seen, strict=True)
        ]
        mixed = [part.view(count, heads, c) for part in parts]
        return self._settled(mixed, sums).to(whole.dtype)

    def _weights(self, logits: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities times their sum, [n, tiles, H, KEYS] fp32, and the sum, [n, H, 1].

        Args:
            logits: [n, tiles, H, KEYS], before the softmax's scale.
            positions: of the n rows.
        """
        num_tiles = logits.shape[1]
        keys = torch.arange(num_tiles * KEYS, device=logits.device).view(num_tiles, 1, KEYS)
        is_future = keys > positions[:, None, None, None]
        scaled = (logits.float() * self._scale).masked_fill_(is_future, -torch.inf)
        peak = scaled.amax((1, 3), keepdim=True)
        weights = tiles.elementwise(torch.exp, scaled - peak)
        return weights, tiles.total(tiles.total(weights)[..., 0].transpose(1, 2))

    @staticmethod
    def _settled(parts: list[Tensor], sums: Tensor) -> Tensor:
        """Σ over tiles, first to last, over the sum of the weights; [n, H, c] fp32."""
        found = parts[0].float()
        for part in parts[1:]:
            found = found + part
        return found / sums
