"""What ``megatron.training.pretrain`` asks of fine-tuning: packs, and one forward step over one."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.training import get_args, get_timers

from megatron_k2.sft.batch import next_batch, weighted_loss
from megatron_k2.sft.dataset import PackedDataset, PackShape
from megatron_k2.sft.sets import open_packs, row_multiple
from megatron_k2.training.providers import STRAGGLERS

SPARE = 1
"""Packs beyond what is drawn: Megatron's sampler refuses to begin at the end, as a run does that is
done and started again."""


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Training and validation packs of ``--sft-data``, on every rank; there is no test split.

    Args:
        num_samples: packs that training, validation and test draw.
        vp_stage: the virtual stage, each of which reads for itself.
    """
    del vp_stage
    args = get_args()
    multiple = row_multiple(args.context_parallel_size)
    shape = PackShape(args.seq_length, multiple, args.sft_loss)
    packing = {"capacity": args.seq_length, "multiple": multiple}
    found = [
        open_packs(args.sft_data, split, number + SPARE, args.seed, **packing) if number else None
        for split, number in zip(("train", "valid"), num_samples, strict=False)
    ]
    train, valid = (None if packs is None else PackedDataset(packs, shape) for packs in found)
    return train, valid, None


datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # every rank builds its own


def forward_step(
    iterator: Iterator[dict[str, Any]], model: torch.nn.Module, return_schedule_plan: bool = False
) -> tuple[Any, Callable[..., Any]]:
    """One pack through this stage; see ``training.providers.forward_step``."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with STRAGGLERS(bdata=True):
        batch = next_batch(iterator, mpu.get_context_parallel_group(), get_args().sft_loss)
    timers("batch-generator").stop()
    forward: Any = model.build_schedule_plan if return_schedule_plan else model
    with STRAGGLERS:
        output = forward(
            batch.tokens,
            batch.position_ids,
            None,
            labels=batch.labels,
            loss_mask=batch.loss_mask,
            packed_seq_params=batch.packed,
        )
    return output, partial(weighted_loss, batch.loss_mask, batch.num_counted)
