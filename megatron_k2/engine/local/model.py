"""A forward pass of K2 over a cache of latents, for rows of many sequences at once.

A step's rows are first one row each of the sequences that decode, then chunks of prompts. Linear
layers, norms and experts see all rows alike; attention sees each sequence's own. A cache row is the
normalised key-value latent and the rotary key, c + r numbers a token and layer.

Attention has two forms. *Absorbed*: the key's up-projection moves to the query and the value's
behind the sum, so that latents are attended to as they lie. *Expanded*: keys and values of every
head are made first. A chunk takes the one with fewer multiplications.

Legend: N rows, D of them decoding, H heads, c latent, n, r, v widths of a head, T cached tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_k2.engine.local.experts import Dispatch, answers, within_groups
from megatron_k2.engine.local.rotary import softmax_scale, tables, turned
from megatron_k2.engine.local.weights import Attention, Experts, Layer, Weights


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one sequence."""

    slot: int
    start: int
    """Position of the first, and how many of this sequence are cached already."""
    count: int


@dataclass(frozen=True)
class Step:
    """Where a step's rows belong."""

    slots: Sequence[int]
    """Of the decoding rows, ascending."""
    positions: Sequence[int]
    """Of the decoding rows; as many tokens of each are cached already."""
    chunks: Sequence[Chunk] = ()

    def row_positions(self, device: torch.device) -> Tensor:
        """Of every row, [N]."""
        parts = [torch.tensor(self.positions, dtype=torch.long)]
        parts += [torch.arange(c.start, c.start + c.count) for c in self.chunks]
        return torch.cat(parts).to(device)


def is_absorption_cheaper(weights: Weights, num_queries: int, num_keys: int) -> bool:
    """Whether a chunk's attention costs fewer multiplications without expanding its keys."""
    p = weights.preset
    c, n, r, v = p.kv_lora_rank, p.qk_head_dim, p.qk_pos_emb_head_dim, p.v_head_dim
    absorbed = num_queries * (num_keys * (2 * c + r) + c * (n + v))
    expanded = num_keys * (c * (n + v) + num_queries * (n + r + v))
    return absorbed < expanded


class LatentModel:
    """Weights and the cache that they fill.

    Args:
        weights: of the model.
        num_slots: sequences at once.
        length: tokens of each.
    """

    def __init__(self, weights: Weights, num_slots: int, length: int) -> None:
        self.weights = weights
        p = self._preset = weights.preset
        self._scale = softmax_scale(p)
        self._cos, self._sin = tables(p, length, weights.device)
        width = p.kv_lora_rank + p.qk_pos_emb_head_dim
        shape = (p.num_layers, num_slots, length, width)
        self.cache = torch.zeros(shape, dtype=weights.dtype, device=weights.device)

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """The first ``count`` tokens' rows of one slot to another."""
        self.cache[:, target, :count] = self.cache[:, source, :count]

    @torch.inference_mode()
    def forward(self, tokens: Tensor, step: Step, *, routes: list[Tensor] | None = None) -> Tensor:
        """Append rows to their sequences; the last norm's output, [N, h].

        Args:
            tokens: [N] int64.
            step: where they belong.
            routes: gets the chosen experts of each MoE layer, [N, k].
        """
        w, positions = self.weights, step.row_positions(self.weights.device)
        rows = Rows(step, positions, self._cos[positions], self._sin[positions])
        x = F.embedding(tokens, w.embedding)
        for number, layer in enumerate(w.layers):
            normed = self._norm(x, layer.attention_norm)
            x = x + self._attend(layer.attention, self.cache[number], normed, rows)
            x = x + self._mlp(layer, self._norm(x, layer.mlp_norm), routes)
        return self._norm(x, w.norm)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, h] -> [rows, V] fp32."""
        return self._linear(hidden, self.weights.head).float()

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def _norm(self, x: Tensor, weight: Tensor, epsilon: float | None = None) -> Tensor:
        """Root mean square in fp32, as Hugging Face's."""
        eps = self._preset.norm_epsilon if epsilon is None else epsilon
        return F.rms_norm(x.float(), (x.shape[-1],), None, eps).to(x.dtype) * weight

    def _attend(self, a: Attention, cache: Tensor, x: Tensor, rows: "Rows") -> Tensor:
        """[N, h] -> [N, h]; ``cache`` [slots, length, c + r] of this layer gets the rows."""
        p, num_rows = self._preset, len(x)
        heads, c, n, r = p.num_attention_heads, p.kv_lora_rank, p.qk_head_dim, p.qk_pos_emb_head_dim
        first, latent, key = self._linear(x, a.down).split([a.down.shape[0] - c - r, c, r], -1)
        if a.query_up is not None and a.query_norm is not None:
            normed = self._norm(first, a.query_norm, p.latent_norm_epsilon)
            first = self._linear(normed, a.query_up)
        query, rotary = first.view(num_rows, heads, n + r).split([n, r], -1)
        rotary = turned(rotary, rows.cos[:, None], rows.sin[:, None])
        latent = self._norm(latent, a.latent_norm, p.latent_norm_epsilon)
        cached = torch.cat([latent, turned(key, rows.cos, rows.sin)], -1)
        cache[rows.slots, rows.positions] = cached
        return self._linear(self._attended(a, query, rotary, cache, rows), a.output)

    def _attended(
        self, a: Attention, query: Tensor, rotary: Tensor, cache: Tensor, rows: "Rows"
    ) -> Tensor:
        """[N, H, n] and [N, H, r] against what each row's sequence has cached; [N, H v]."""
        parts, num_decoding = [], len(rows.step.slots)
        if num_decoding:
            seen, mask = rows.decoded(cache)
            out = self._absorbed(
                a, query[None, :num_decoding], rotary[None, :num_decoding], seen, mask
            )
            parts.append(out[0])
        begin = num_decoding
        for chunk in rows.step.chunks:
            here = slice(begin, begin + chunk.count)
            seen = cache[chunk.slot, : chunk.start + chunk.count]
            parts.append(self._chunk(a, query[here], rotary[here], seen, chunk))
            begin += chunk.count
        return torch.cat(parts)

    def _absorbed(
        self, a: Attention, query: Tensor, rotary: Tensor, seen: Tensor, mask: Tensor
    ) -> Tensor:
        """[B, q, H, n] and [B, q, H, r] against latents; [B, q, H v].

        One sequence of many rows, or (q and B change places) many sequences of one row.

        Args:
            a: the layer's weights.
            query: position-free part.
            rotary: the part that was turned.
            seen: [T, c + r] of the one sequence, or [q, T, c + r], each row's own.
            mask: [q, T] fp32, 0 or -inf.
        """
        p = self._preset
        heads, c, n, v = p.num_attention_heads, p.kv_lora_rank, p.qk_head_dim, p.v_head_dim
        up = a.latent_up.view(heads, n + v, c)
        count = query.shape[1]
        moved = torch.bmm(query[0].transpose(0, 1), up[:, :n]).transpose(0, 1)  # [q, H, c]
        whole = torch.cat([moved, rotary[0]], -1)
        if seen.dim() == 2:
            logits = (whole.flatten(0, 1) @ seen.t()).view(count, heads, -1)
        else:
            logits = torch.bmm(whole, seen.transpose(1, 2))
        logits = logits.float().mul_(self._scale).add_(mask[:, None])
        probs = logits.softmax(-1).to(seen.dtype)
        if seen.dim() == 2:
            mixed = (probs.flatten(0, 1) @ seen[:, :c]).view(count, heads, c)
        else:
            mixed = torch.bmm(probs, seen[..., :c])
        values = torch.bmm(mixed.transpose(0, 1), up[:, n:].transpose(1, 2))  # [H, q, v]
        return values.transpose(0, 1).reshape(1, count, heads * v)

    def _chunk(
        self, a: Attention, query: Tensor, rotary: Tensor, seen: Tensor, chunk: Chunk
    ) -> Tensor:
        """A prompt's rows against their sequence, [q, H v]."""
        p, count, num_keys = self._preset, chunk.count, len(seen)
        heads, c, n, v = p.num_attention_heads, p.kv_lora_rank, p.qk_head_dim, p.v_head_dim
        keys = torch.arange(num_keys, device=seen.device)
        is_future = keys > keys[chunk.start :, None]
        if is_absorption_cheaper(self.weights, count, num_keys):
            mask = torch.zeros(count, num_keys, device=seen.device)
            mask.masked_fill_(is_future, -torch.inf)
            return self._absorbed(a, query[None], rotary[None], seen, mask)[0]
        both = F.linear(seen[:, :c], a.latent_up).view(num_keys, heads, n + v)
        shared = seen[:, None, c:].expand(-1, heads, -1)
        q, k = torch.cat([query, rotary], -1), torch.cat([both[..., :n], shared], -1)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            both[..., n:].transpose(0, 1)[None],
            attn_mask=None if chunk.start == 0 else ~is_future,
            is_causal=chunk.start == 0,
            scale=self._scale,
        )
        return out[0].transpose(0, 1).reshape(count, heads * v)

    def _mlp(self, layer: Layer, x: Tensor, routes: list[Tensor] | None) -> Tensor:
        out = self._swiglu(x, layer.up, layer.down)
        if layer.experts is None:
            return out
        chosen, shares = self._routed(layer.experts, x)
        if routes is not None:
            routes.append(chosen)
        dispatch = Dispatch(chosen, shares, len(layer.experts.up))
        return out + self._routed_sum(layer.experts, x, dispatch)

    def _swiglu(self, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        gate, value = self._linear(x, up).chunk(2, -1)
        return self._linear(F.silu(gate) * value, down)

    def _routed_sum(self, experts: Experts, x: Tensor, dispatch: Dispatch) -> Tensor:
        """Σ share · expert(x) of each row's experts, [N, h]."""
        return dispatch.returned(x, answers(experts, dispatch.sent(x), dispatch.counts))

    def _routed(self, experts: Experts, x: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen experts [N, k] and their weights [N, k] fp32."""
        p, scores = self._preset, self._scores(experts, x)
        ranked = within_groups(scores + experts.bias, *self.weights.expert_groups)
        chosen = ranked.topk(p.moe_router_topk, -1, sorted=False).indices
        shares = scores.gather(1, chosen)
        shares = shares / (self._share_total(shares) + 1e-20)
        return chosen, shares * p.moe_router_topk_scaling_factor

    def _scores(self, experts: Experts, x: Tensor) -> Tensor:
        return F.linear(x.float(), experts.router).sigmoid()

    def _share_total(self, shares: Tensor) -> Tensor:
        return shares.sum(-1, keepdim=True)


class Rows:
    """What every layer of one step shares."""

    def __init__(self, step: Step, positions: Tensor, cos: Tensor, sin: Tensor) -> None:
        self.step, self.positions, self.cos, self.sin = step, positions, cos, sin
        self.slots = torch.tensor(
            [*step.slots, *(c.slot for c in step.chunks for _ in range(c.count))],
            device=positions.device,
        )
        num_decoding = len(step.slots)
        self._decoding = self.slots[:num_decoding]
        self._num_seen = max(step.positions, default=-1) + 1
        mask = torch.zeros(num_decoding, self._num_seen, device=positions.device)
        keys = torch.arange(self._num_seen, device=positions.device)
        self._mask = mask.masked_fill_(keys > positions[:num_decoding, None], -torch.inf)

    def decoded(self, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of the decoding sequences [D, T, c + r], a view where the slots are the first."""
        slots, length = self.step.slots, self._num_seen
        if slots[-1] == len(slots) - 1:
            return cache[: len(slots), :length], self._mask
        return cache[self._decoding, :length], self._mask
