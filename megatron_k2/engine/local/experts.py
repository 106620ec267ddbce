"""Routed experts: which of them a row may use, and the sum of their answers."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_k2.engine.local.weights import Experts

MAX_GROUPED_ELEMENTS = 1 << 21
"""Of one expert's up-projection: above it a loop over experts is faster than ``grouped_mm`` on a
CPU, whose products then fill the caches by themselves."""


def within_groups(scores: Tensor, num_groups: int, num_chosen: int) -> Tensor:
    """Scores of experts outside a row's best groups are -inf; DeepSeek-V3's limit on nodes.

    A group is as good as the sum of its two best.

    Args:
        scores: [N, E] fp32, bias included.
        num_groups: equal runs of experts.
        num_chosen: groups that a row may use.
    """
    if num_chosen == num_groups:
        return scores
    groups = scores.view(len(scores), num_groups, -1)
    best = groups.topk(2, -1).values.sum(-1).topk(num_chosen, -1).indices
    is_open = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, True)
    return groups.masked_fill(~is_open[..., None], -torch.inf).flatten(1)


class Dispatch:
    """Rows put in the order of their experts, and their answers put back.

    Args:
        chosen: [N, k] int64.
        shares: [N, k] fp32.
        num_experts: of the layer.
    """

    def __init__(self, chosen: Tensor, shares: Tensor, num_experts: int) -> None:
        self._order = order = chosen.flatten().argsort(stable=True)
        self.counts = torch.bincount(chosen.flatten(), minlength=num_experts)
        """Rows of each expert, [E]."""
        self._token = order // chosen.shape[1]
        self._shares = shares

    def sent(self, x: Tensor) -> Tensor:
        """[N, h] -> [N k, h], by expert, then by row."""
        return x[self._token]

    def returned(self, x: Tensor, answers: Tensor) -> Tensor:
        """Σ share · answer, [N, h]; a row's experts are added in ascending order."""
        share = self._shares.flatten()[self._order, None].to(x.dtype)
        return torch.zeros_like(x).index_add_(0, self._token, answers * share)

    def by_row(self, answers: Tensor) -> Tensor:
        """Each answer times its share, [N, k, h] in the order of ``chosen``."""
        back = self._order.argsort()
        found = answers[back].view(*self._shares.shape, -1)
        return found * self._shares[..., None].to(answers.dtype)


def answers(experts: Experts, rows: Tensor, counts: Tensor) -> Tensor:
    """Each expert's SwiGLU of its rows, [R, h].

    Args:
        experts: of one layer.
        rows: [R, h], by expert.
        counts: of each expert's rows, [E] int64.
    """
    if _may_group(experts, rows):
        ends = counts.cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(rows, experts.up.transpose(1, 2), offs=ends).chunk(2, -1)
        return F.grouped_mm(F.silu(gate) * up, experts.down.transpose(1, 2), offs=ends)
    parts = []
    for expert, part in enumerate(rows.split(counts.tolist())):
        if len(part):
            gate, up = F.linear(part, experts.up[expert]).chunk(2, -1)
            parts.append(F.linear(F.silu(gate) * up, experts.down[expert]))
    return torch.cat(parts)


def _may_group(experts: Experts, x: Tensor) -> bool:
    """Whether ``grouped_mm`` takes these rows, of 16 bytes or a multiple, and is worth it."""
    widths = (x.shape[1], experts.down.shape[2])
    is_aligned = all(width * x.element_size() % 16 == 0 for width in widths)
    return is_aligned and (x.is_cuda or experts.up[0].numel() <= MAX_GROUPED_ELEMENTS)
