"""One pack on its way into the model: this context-parallel rank's rows, and the loss over them.

Every rank reads the pack itself, middle pipeline stages too: attention and padding need a
document's bounds on all of them, and what is read is a few kilobytes of a mapped file.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_k2.model.packed import PackedDocuments, PackLayout, describe

_ROWS = ("tokens", "labels", "loss_mask", "position_ids")


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one pack; rows are [1, s / CP]."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    packed: PackedDocuments
    num_counted: Tensor
    """What the loss is divided by, this rank's share: targets, or samples. int32, 0-d."""


def next_batch(iterator: Iterator[dict[str, Any]], cp_group: Any, loss: str) -> Batch:
    """This rank's part of the next pack, on its device.

    Args:
        iterator: of the data loader, whose batches are one pack each.
        cp_group: context-parallel.
        loss: one of ``dataset.LOSSES``; samples are counted by the first rank of ``cp_group``.
    """
    sample = next(iterator)
    layout = PackLayout(
        tuple(sample["lengths"][0].tolist()), tuple(sample["cu_seqlens"][0].tolist())
    )
    rows = layout.rows_of_rank(cp_group.size(), cp_group.rank())
    device = torch.device(torch.cuda.current_device())
    here = torch.from_numpy(rows)
    parts = {name: sample[name][:, here].to(device, non_blocking=True) for name in _ROWS}
    packed = describe(layout, rows, device)
    packed.loss_weight = parts["loss_mask"].sum()
    if loss == "token":
        num_counted = (parts["loss_mask"] > 0).sum(dtype=torch.int32)
    else:
        share = sample["num_samples"][0] * (cp_group.rank() == 0)
        num_counted = share.to(device, dtype=torch.int32)
    return Batch(**parts, packed=packed, num_counted=num_counted)


def weighted_loss(
    loss_mask: Tensor, num_counted: Tensor, per_token_loss: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the targets' losses times their weights, and what to divide by; summed over no group.

    Megatron divides gradients by ``num_counted`` of the global batch
    (``--calculate-per-token-loss``). Rows without weight are left out, not multiplied by zero.
    """
    losses, weights = per_token_loss.view(-1).float(), loss_mask.view(-1)
    total = torch.where(weights > 0, losses * weights, 0).sum()
    report = torch.stack([total.detach(), num_counted.to(total.dtype)])
    return total, num_counted, {"lm loss": report}
