"""pi_old: log-probabilities of what was sampled, by the trainer, before the iteration's first step.

Not the engine's: a mismatch of 1e-3 a token is 32 nats over an answer of 32k tokens, and the
sequence form squares it. What the engine said is compared with it here, token by token, over those
that the same version drew; the difference is numerical, and an alarm's business where it grows.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from torch import Tensor

from megatron_k2.rl.learnt import Mismatch
from megatron_k2.rl.micro_batch import MicroBatch, Old, forward, scored_twice
from megatron_k2.rl.replay import Replay


def old_logprobs(
    forward_backward: Any,
    stages: list[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    replay: Replay | None,
    seq_length: int,
) -> list[Old | None]:
    """pi_old of each micro-batch of this rank; collective over all ranks.

    Args:
        forward_backward: Megatron's schedule, ``get_forward_backward_func()``.
        stages: this rank's model, one for each virtual stage.
        micro_batches: as many on every data-parallel rank.
        replay: of the same stages, or ``None``.
        seq_length: s of a pack, whole.

    Returns:
        One each on the last pipeline stage, ``None`` elsewhere.
    """
    if not micro_batches:
        return []
    # In evaluation the attention records no S_max and routers count nothing.
    for stage in stages:
        stage.eval()
    iterators: list[Iterator[MicroBatch]] = [iter(micro_batches) for _ in stages]
    with torch.no_grad():
        found = forward_backward(
            forward_step_func=partial(_forward_step, replay=replay),
            data_iterator=iterators if len(stages) > 1 else iterators[0],
            model=stages,
            num_microbatches=len(micro_batches),
            seq_length=seq_length,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    for stage in stages:
        stage.train()
    if not found:
        return [None] * len(micro_batches)
    return [
        Old(both[0], both[1] - batch.behaviour)
        for both, batch in zip(found, micro_batches, strict=True)
    ]


def _forward_step(
    iterator: Iterator[MicroBatch], stage: torch.nn.Module, *, replay: Replay | None
) -> tuple[Tensor, Any]:
    output, _ = forward(iterator, stage, replay, scored_twice)
    return output, _as_it_is


def _as_it_is(output: Tensor, non_loss_data: bool) -> Tensor:
    """What is collected; [2, s / CP]."""
    del non_loss_data
    return output


def mismatch(micro_batches: Sequence[MicroBatch]) -> Mismatch:
    """The trainer's numbers against the engine's; collective, the same on every rank.

    Args:
        micro_batches: of this rank, all of an iteration, with pi_old.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    most = torch.zeros(1, dtype=torch.float64)
    for batch in micro_batches:
        old = batch.old
        if old is None or not bool(batch.is_current.any()):
            continue
        difference = old.over_behaviour[batch.is_current].double()
        kl = difference.exp() - 1 - difference
        each = torch.stack([torch.ones_like(kl), difference.abs(), difference, kl])
        sums += each.sum(1).cpu()
        most = torch.maximum(most, difference.abs().max().cpu())
    count, absolute, total, rest_total, largest = everyones(sums, most).tolist()
    if not count:
        return Mismatch(0, math.nan, math.nan, math.nan, math.nan)
    return Mismatch(int(count), absolute / count, largest, total / count, rest_total / count)


def everyones(sums: Tensor, most: Tensor | None = None) -> Tensor:
    """Of the last pipeline stage's data- and context-parallel ranks together, on every rank.

    Args:
        sums: [n] on the CPU, of any values on the other stages; to be added up.
        most: [m] the same; of which the largest are wanted.

    Returns:
        [n + m] in fp64.
    """
    device = torch.device(torch.cuda.current_device())
    group = mpu.get_data_parallel_group(with_context_parallel=True)
    found = sums.double().to(device)
    dist.all_reduce(found, group=group)
    if most is not None:
        largest = most.double().to(device)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        found = torch.cat([found, largest])
    dist.broadcast(
        found,
        src=mpu.get_pipeline_model_parallel_last_rank(),
        group=mpu.get_pipeline_model_parallel_group(),
    )
    return found.cpu()
