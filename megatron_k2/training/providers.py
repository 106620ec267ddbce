"""What ``megatron.training.pretrain`` asks of a plugin: data, and one forward step."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import MockGPTDataset
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import (
    StragglerDetector,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
    get_model_config,
)
from megatron.training import get_args, get_timers
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

from megatron_k2.data.gpt_dataset import ContentConfig, ContentDataset, contents_of

STRAGGLERS = StragglerDetector()
"""Megatron's one instance; it times what is inside ``with`` under ``--log-straggler``, on GPUs."""
BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
_LOADER_KEYS = (
    *BATCH_KEYS,
    "cu_seqlens",
    "cu_seqlens_padded",
    "max_seqlen",
    "local_cp_size",
    "hybrid_cp_group",
)


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Training, validation and test datasets from Megatron's data flags."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    blends = [blend] if blend_per_split is None else blend_per_split
    prefixes = [prefix for one in blends if one is not None for prefix in one[0]]
    config = ContentConfig(
        contents=contents_of(list(dict.fromkeys(prefixes))),
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
    )

    def is_built_on_rank() -> bool:
        return mpu.get_tensor_model_parallel_rank() == 0 and is_first_or_last_pipeline_stage(
            vp_stage
        )

    kind = MockGPTDataset if args.mock_data else ContentDataset
    return BlendedMegatronDatasetBuilder(kind, num_samples, is_built_on_rank, config).build()


datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # every rank builds its part


def get_batch(iterator: Iterator[dict[str, Any]], vp_stage: int | None) -> list[Tensor | None]:
    """This rank's part of the next micro-batch, in ``BATCH_KEYS`` order; [b, s / cp] each."""
    args = get_args()
    if not is_first_or_last_pipeline_stage(vp_stage):
        return [None] * len(BATCH_KEYS)
    batch: dict[str, Any] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        batch = {key: _on_device(value) for key, value in next(iterator).items()}
        batch = {key: batch.get(key) for key in _LOADER_KEYS}
    batch = get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=bool(args.mtp_num_layers),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )
    return [batch.get(key) for key in BATCH_KEYS]


def _on_device(value: Any) -> Any:
    """A tensor of the loader's pinned memory on this rank's device, without waiting for it."""
    return value.cuda(non_blocking=True) if torch.is_tensor(value) else value


def loss_func(
    loss_mask: Tensor | None, per_token_loss: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the unmasked tokens' losses and their number, summed over nothing yet.

    Megatron divides by the number of tokens of the global batch (``--calculate-per-token-loss``).
    """
    assert loss_mask is not None  # only the last stage computes a loss, and it has a mask
    losses = per_token_loss.view(-1).float()
    mask = loss_mask.view(-1).float()
    total = (losses * mask).sum()
    num_tokens = mask.sum().detach().to(torch.int)
    report = torch.stack([total.detach(), num_tokens.to(total.dtype)])
    return total, num_tokens, {"lm loss": report}


def forward_step(
    iterator: Iterator[dict[str, Any]], model: torch.nn.Module, return_schedule_plan: bool = False
) -> tuple[Any, Callable[..., Any]]:
    """One micro-batch through this stage: its output, and the loss function of it.

    Under ``--overlap-moe-expert-parallel-comm`` Megatron asks for the plan of the stage's layers
    instead, runs it interleaved with another micro-batch's backward, and ``model`` is the unwrapped
    model.
    """
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    with STRAGGLERS(bdata=True):
        tokens, labels, loss_mask, attention_mask, position_ids = get_batch(iterator, vp_stage)
    timers("batch-generator").stop()
    forward: Any = model.build_schedule_plan if return_schedule_plan else model
    with STRAGGLERS:
        output = forward(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask)
    loss = partial(loss_func, loss_mask)
    finalize = get_model_config(model).finalize_model_grads_func
    # An evaluation has the same config and no gradients to finalise.
    is_counting = finalize.is_counting and torch.is_grad_enabled()
    return output, partial(_counted, finalize.count, loss) if is_counting else loss


def _counted(
    count: Callable[[Tensor], None], loss: Callable[[Tensor], Any], per_token_loss: Tensor
) -> Any:
    """``loss``, whose number of tokens is added to the batch's."""
    found = loss(per_token_loss)
    count(found[1])
    return found
