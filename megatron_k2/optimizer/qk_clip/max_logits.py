"""S_max of every head on this rank: where the attention writes it, and its reduction.

Kimi K2 report (arXiv:2507.20534), section 2.1: S_max of a head is the largest softmax input over
the whole batch. Heads are split over tensor-parallel ranks and layers over pipeline stages, so the
only ranks that hold a part of the same head's maximum are the data- and context-parallel ones.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def attention_modules(model_chunks: list[torch.nn.Module]) -> list[Any]:
    """Every self-attention whose core records its maximum logits: decoder and MTP layers alike."""
    return [
        module
        for chunk in model_chunks
        for module in chunk.modules()
        if hasattr(getattr(module, "core_attention", None), "current_max_attn_logits")
    ]


def silent_attentions(model_chunks: list[torch.nn.Module]) -> list[Any]:
    """Every self-attention whose core has no place for its maximum logits."""
    from megatron.core.transformer.attention import Attention

    return [
        module
        for chunk in model_chunks
        for module in chunk.modules()
        if isinstance(module, Attention)
        and not hasattr(getattr(module, "core_attention", None), "current_max_attn_logits")
    ]


class MaxLogits:
    """One persistent fp32 tensor that all local attention modules write into.

    Sources, by what their core attention does with ``current_max_attn_logits``:

    - ours (``MLACoreAttention``) takes the running maximum in place, in training mode only; the
      attribute is a row of ``running``;
    - Transformer Engine's ``return_max_logit`` assigns a new tensor, rounded to bf16, in evaluation
      as well; it is collected after each training forward and dropped after the others.

    Attributes:
        attentions: the modules, in the order of the rows.
        running: [attention modules, heads on this rank], maxima since the last ``finish``; this
            rank's tokens only. ``-inf`` where nothing was recorded.
        latest: what the last ``finish`` returned.
        silent: attention modules that are not among them, as their core records nothing.
    """

    def __init__(self, model_chunks: list[torch.nn.Module]) -> None:
        self.attentions = attention_modules(model_chunks)
        self.silent = silent_attentions(model_chunks)
        heads = {m.num_attention_heads_per_partition for m in self.attentions}
        if len(heads) > 1:
            raise ValueError(f"attention modules with different numbers of heads: {sorted(heads)}")
        shape = (len(self.attentions), heads.pop() if heads else 0)
        device = next(model_chunks[0].parameters()).device
        self.running = torch.full(shape, -math.inf, dtype=torch.float32, device=device)
        self.latest = self.running.clone()
        self._work: dist.Work | None = None
        for row, attention in zip(self.running, self.attentions, strict=True):
            core = attention.core_attention
            if core.current_max_attn_logits is None:
                core.register_forward_hook(_collect_into(row))
            else:
                core.current_max_attn_logits = row

    def start(self, group: dist.ProcessGroup) -> None:
        """Begin the reduction over ``group`` (data x context parallel): one MAX all-reduce."""
        self._work = None
        if self.running.numel() and group.size() > 1:
            self._work = dist.all_reduce(
                self.running, op=dist.ReduceOp.MAX, group=group, async_op=True
            )

    def finish(self) -> Tensor:
        """Maxima of the step, reduced; the next step starts anew.

        Returns:
            [attention modules, heads on this rank] fp32.
        """
        if self._work is not None:
            self._work.wait()
            self._work = None
        self.latest = self.running.clone()
        self.running.fill_(-math.inf)
        return self.latest

    def unrecorded(self) -> list[Any]:
        """Attention modules that recorded nothing at all in the last step."""
        never = (self.latest == -math.inf).all(-1).tolist()
        return [m for m, is_silent in zip(self.attentions, never, strict=True) if is_silent]

    def take(self, group: dist.ProcessGroup) -> Tensor:
        """``start`` and ``finish`` at once."""
        self.start(group)
        return self.finish()


def _collect_into(row: Tensor) -> Callable[[Any, Any, Any], None]:
    """Forward hook for cores that assign their maximum, also in evaluation."""

    def hook(core: Any, _inputs: Any, _output: Any) -> None:
        recorded, core.current_max_attn_logits = core.current_max_attn_logits, None
        if recorded is not None and core.training:
            torch.maximum(row, recorded.to(row.dtype), out=row)

    return hook
