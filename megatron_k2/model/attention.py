"""Core attention for MLA without Transformer Engine: exact, in blocks, with each head's S_max.

Megatron-Core 0.19.2's local ``DotProductAttention`` cannot be built by MLA (it does not take
``k_channels``) and records no maximum logit. This one does, on any device:

- softmax of ``scale * Q Kᵀ`` in fp32 (fp64 for fp64 inputs), causal;
- rows are worked through in blocks, forward and backward, so that only
  ``b * h * block * s_k`` logits exist at a time and none are kept for the backward pass;
- context parallelism by an all-gather of K and V over the zigzag layout;
- packed documents (``thd``), each of which sees itself alone or goes on from another of the pack,
  or any boolean mask;
- S_max of each head (Kimi K2 report, section 2.1: the largest input to softmax) in training mode.

Legend: ``s`` sequence, ``b`` batch, ``h`` heads on this rank, ``d`` width of a head.
Megatron hands over ``[s, b, h, d]``; the arithmetic runs on ``[b, h, s, d]``.
"""

import itertools
import math
from typing import Any, override

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_k2.model.packed import GatherRows, PackLayout, SeenRows
from megatron_k2.model.segments import (
    Block,
    Segment,
    blocks_of,
    document_segments,
    whole_sequence,
)

LOGIT_BLOCK_BYTES = 64 << 20
"""Upper bound on the logits held at once; a block is never less than one query row."""
MIN_BLOCKS, MIN_BLOCK_ROWS = 16, 64
"""A block computes the keys up to its own last row, so n blocks do (n + 1) / 2n of the square: 53 %
with 16. Below 64 rows matrix products lose more than the diagonal saves (b 2, h 8, s 1024, fp32 on
a CPU, forward and backward: one block 371 ms, 128 rows 161, 64 rows 138, 32 rows 180)."""
CUDA_LOGIT_BLOCK_BYTES, CUDA_MIN_BLOCKS = 256 << 20, 4
"""The same for a GPU, which starts a kernel for each operation on a block: on an H200 a step of
``k2-mini`` was 32,000 starts and 1.2 s, of which the GPU worked 0.22."""


class _BlockwiseCausalAttention(torch.autograd.Function):
    """softmax(scale Q Kᵀ) V by blocks of rows; the backward pass recomputes each block."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        blocks: list[Block],
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        b, h, s, _ = q.shape
        q = q * scale
        is_whole = sum(block.end - block.start for block in blocks) == s
        out = (q.new_empty if is_whole else q.new_zeros)(b, h, s, v.shape[-1])
        log_normaliser = q.new_empty(b, h, s)
        max_logit = q.new_full((h,), -math.inf)
        for block in blocks:
            start, end = block.start, block.end
            logits = _block_logits(q, k, block, mask)
            row_max = logits.amax(-1, keepdim=True)
            torch.maximum(max_logit, row_max.amax((0, 2, 3)), out=max_logit)
            probs = logits.sub_(row_max).exp_()
            normaliser = probs.sum(-1, keepdim=True)
            block_out = torch.matmul(probs, v[:, :, block.first_key : block.end_key])
            out[:, :, start:end] = block_out.div_(normaliser)
            log_normaliser[:, :, start:end] = (normaliser.log_() + row_max).squeeze(-1)
        ctx.save_for_backward(q, k, v, out, log_normaliser)
        ctx.scale, ctx.blocks, ctx.mask, ctx.is_whole = scale, blocks, mask, is_whole
        ctx.mark_non_differentiable(max_logit)
        return out, max_logit

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_out = grads[0].contiguous()
        q, k, v, out, log_normaliser = ctx.saved_tensors
        grad_q = torch.empty_like(q) if ctx.is_whole else torch.zeros_like(q)
        grad_k, grad_v = k.new_zeros(k.shape), v.new_zeros(v.shape)  # contiguous, whatever k is
        # Σ_j P_ij dP_ij = dO_i · O_i: the softmax correction without the probabilities.
        correction = (grad_out * out).sum(-1, keepdim=True)
        for block in ctx.blocks:
            start, end, keys = block.start, block.end, slice(block.first_key, block.end_key)
            logits = _block_logits(q, k, block, ctx.mask)
            probs = logits.sub_(log_normaliser[:, :, start:end, None]).exp_()
            block_grad = grad_out[:, :, start:end]
            _add_product(grad_v[:, :, keys], probs.transpose(-1, -2), block_grad)
            grad_logits = torch.matmul(block_grad, v[:, :, keys].transpose(-1, -2))
            grad_logits.sub_(correction[:, :, start:end]).mul_(probs)
            torch.matmul(grad_logits, k[:, :, keys], out=grad_q[:, :, start:end])
            _add_product(grad_k[:, :, keys], grad_logits.transpose(-1, -2), q[:, :, start:end])
        return grad_q.mul_(ctx.scale), grad_k, grad_v, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` in place, without the product in between; [b, h, ...] each.

    ``total`` is contiguous but for a slice of its rows; ``view`` raises where it is not.
    """
    total.view(-1, *total.shape[2:]).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))


def _block_logits(q: Tensor, k: Tensor, block: Block, mask: Tensor | None) -> Tensor:
    """Logits of a block's query rows against every key they may see, -inf where masked."""
    keys = slice(block.first_key, block.end_key)
    logits = torch.matmul(q[:, :, block.start : block.end], k[:, :, keys].transpose(-1, -2))
    if mask is not None:
        return logits.masked_fill_(mask[:, :, block.start : block.end, keys], -math.inf)
    # Only the last columns lie beyond some row's own position.
    corner = logits[..., block.position :]
    future = torch.ones(corner.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
    corner.masked_fill_(future, -math.inf)
    return logits


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    segments: tuple[Segment, ...] | None = None,
    mask: Tensor | None = None,
    block_bytes: int | None = None,
    num_keys: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal softmax attention and each head's largest logit.

    Args:
        q: queries [b, h, s, d]; any float dtype, computed in fp32 (fp64 for fp64).
        k: keys [b, h, s_k, d].
        v: values [b, h, s_k, d_v].
        scale: multiplies the logits, YaRN's mscale² included.
        segments: where the query rows stand among the keys; the whole sequence by default. Rows
            in none of them get 0 and are in no maximum.
        mask: bool [b or 1, 1, s, s_k], True where attention is forbidden; must contain the causal
            part. ``None`` means causal.
        block_bytes: logits held at once; by default at most the device's bound, and fewer where
            that saves work above the diagonal.
        num_keys: the most that a row sees, for the size of blocks; s_k by default.

    Returns:
        Output [b, h, s, d_v] in ``v``'s dtype, and S_max [h] in the compute dtype, over this
        rank's batch and rows: reduced over no group.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    b, h, s, _ = q.shape
    if segments is None:
        segments = whole_sequence(s)
    element = torch.finfo(compute).bits // 8
    num_keys = k.shape[2] if num_keys is None else num_keys
    row_bytes = max(1, b * h * num_keys * element)
    largest, num_blocks = LOGIT_BLOCK_BYTES, MIN_BLOCKS
    if q.is_cuda:
        largest, num_blocks = CUDA_LOGIT_BLOCK_BYTES, CUDA_MIN_BLOCKS
    rows = max(1, (block_bytes or largest) // row_bytes)
    if block_bytes is None:
        rows = min(rows, max(MIN_BLOCK_ROWS, num_keys // num_blocks))
    out, max_logit = _BlockwiseCausalAttention.apply(
        q.to(compute), k.to(compute), v.to(compute), scale, blocks_of(segments, rows), mask
    )
    return out.to(v.dtype), max_logit


class MLACoreAttention(MegatronModule):
    """``core_attention`` of Megatron's MLA for the local (no Transformer Engine) path.

    ``current_max_attn_logits`` [heads on this rank] fp32 holds S_max over the micro-batches since
    the last optimizer step: this rank's tokens only, reduced over no group. It is written in place,
    in training mode only, and a recomputed forward writes the same values again.
    ``optimizer.qk_clip.max_logits.MaxLogits`` puts a row of its own there, and starts it anew after
    each step.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_unused: Any,
    ) -> None:
        super().__init__(config=config)
        del attn_mask_type, attention_type, v_channels, cp_comm_type, _unused
        if (attention_dropout or config.attention_dropout) != 0.0:
            raise ValueError("MLACoreAttention has no attention dropout; set --attention-dropout 0")
        pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        self.layer_number = layer_number
        self.cp_group = pg_collection.cp
        # Attention.__init__ first builds the core without k_channels, then MLA builds it again.
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(k_channels or config.kv_channels)
        heads = config.num_attention_heads // pg_collection.tp.size()
        self.register_buffer(
            "current_max_attn_logits",
            torch.full((heads,), -math.inf, dtype=torch.float32),
            persistent=False,
        )

    @override
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **_unused: Any,
    ) -> Tensor:
        """[s, b, h, d] (packed: [t, h, d]) each -> [s, b, h * d_v] (packed: [t, h * d_v])."""
        del attn_mask_type, _unused
        if attention_bias is not None:
            raise ValueError("MLACoreAttention takes no attention bias")
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        cp_size = self.cp_group.size()
        if cp_size > 1 and attention_mask is not None:
            raise ValueError("an attention mask cannot be combined with context parallelism")
        if k.shape[2] != q.shape[2]:
            out = self._continued(q, k, v, attention_mask)
        else:
            num_rows = q.shape[2] * cp_size
            layout = PackLayout((num_rows,), (0, num_rows))
            out = self._attend(q, k, v, layout, attention_mask)
        return out.permute(2, 0, 1, 3).flatten(2)

    def _continued(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Rows at the end of cached keys, as Megatron's static inference context hands them over.

        [b, h, s, d] and [b, h, s_k, d]; every row of the batch is as far as the others.
        """
        s, s_k = q.shape[2], k.shape[2]
        if self.cp_group.size() > 1 or s_k < s or k.shape[1] != q.shape[1]:
            raise ValueError(
                f"{s} query rows over {s_k} keys: expected the rows to be the last of the keys', "
                "as many heads of each, and no context parallelism"
            )
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        segments = (Segment(0, s, s_k - s),)
        return causal_attention(q, k, v, self.softmax_scale, segments, mask)[0]

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: PackLayout,
        mask: Tensor | None = None,
    ) -> Tensor:
        """This rank's rows against all of their documents. [b, h, s / CP, d] each."""
        group = self.cp_group
        if group.size() > 1:
            k, v = GatherRows.apply(k, group, layout), GatherRows.apply(v, group, layout)
        if layout.beginnings:
            k, v = SeenRows.apply(k, layout), SeenRows.apply(v, layout)
        if k.shape[1] != q.shape[1]:  # grouped queries: heads of a group are adjacent
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        segments = document_segments(layout, group.size(), group.rank())
        scale, longest = self.softmax_scale, layout.longest
        out, max_logit = causal_attention(q, k, v, scale, segments, mask, num_keys=longest)
        if self.training:
            recorded = self.current_max_attn_logits
            torch.maximum(recorded, max_logit.to(recorded.dtype), out=recorded)
        return out

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, packed: Any) -> Tensor:
        """Documents laid end to end, by their layout. [t, h, d] -> [t, h * d_v]."""
        if packed.qkv_format != "thd":
            raise ValueError(f"packed qkv_format={packed.qkv_format!r}; only 'thd' is supported")
        layout = getattr(packed, "layout", None)
        if layout is None:  # Megatron's own description: no padding is known of
            bounds = packed.cu_seqlens_q.tolist()
            lengths = tuple(end - start for start, end in itertools.pairwise(bounds))
            layout = PackLayout(lengths, tuple(bounds))
        q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
        return self._attend(q, k, v, layout)[0].transpose(0, 1).flatten(1)
