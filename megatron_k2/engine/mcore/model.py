"""A checkpoint's weights in a model at any layout, and forward passes through it.

Weights come through ``megatron.core.dist_checkpointing``, which reshards; forward passes go through
Megatron's own schedules, so pipeline stages, tensor, expert and context parallelism are those of
training. No optimizer, no training loop, none of Megatron's global arguments.

Legend: ``n`` micro-batches, ``b`` sequences of one, ``s`` tokens of one, ``V`` ids (no padding).
"""

import contextlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megatron_k2.model.build import K2ModelBuilder, model_config_from_args
from megatron_k2.parallel.layout import Layout

Collect = Callable[[Tensor, dict[str, Tensor]], Any]
"""(logits of this rank, micro-batch of this rank) -> what to keep of it; on the last stage only."""


@contextlib.contextmanager
def parallel_world(layout: Layout) -> Iterator[None]:
    """Megatron's process groups at ``layout``, over the process group that exists already."""
    parallel_state.initialize_model_parallel(**layout.megatron_sizes())
    try:
        tensor_parallel.model_parallel_cuda_manual_seed(0)  # initial values are overwritten
        yield
    finally:
        parallel_state.destroy_model_parallel()


@dataclass(frozen=True)
class InferenceModel:
    """This rank's part of a model in evaluation mode."""

    stages: list[torch.nn.Module]
    """One: virtual stages would only shorten a pipeline's bubble."""
    vocab_size: int
    """V: the tokenizer's ids, without the padding that TP adds to the vocabulary."""

    def run(self, batches: list[dict[str, Tensor]], collect: Collect) -> list[Any]:
        """Forward micro-batches of equal shape through all stages.

        Args:
            batches: of this data-parallel rank, each of ``[b, s]`` tensors with ``tokens`` among
                them; whole sequences, this cuts them for context parallelism.
            collect: called with logits ``[b, s / CP, V_padded / TP]`` on the last stage.

        Returns:
            What ``collect`` returned for each, in order; empty on the other stages.
        """
        mine = [_on_this_cp_rank(batch) for batch in batches]

        def step(iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module) -> Any:
            batch = next(iterator)
            logits = model(batch["tokens"], batch["positions"], None)
            return logits, lambda output, non_loss_data: collect(output, batch)

        b, s = batches[0]["tokens"].shape
        with torch.no_grad():
            return get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=iter(mine),
                model=self.stages,
                num_microbatches=len(mine),
                seq_length=s,
                micro_batch_size=b,
                forward_only=True,
                collect_non_loss_data=True,
            )

    def token_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """-ln p(label), [b, s / CP] fp32, over the V ids: the padding's logits are -inf."""
        return tensor_parallel.vocab_parallel_cross_entropy(logits.float(), labels)

    def whole_logits(self, tokens: Tensor, positions: slice = slice(None)) -> Tensor:
        """Logits of the same tokens on every rank, [b, positions, V] fp32, whatever the layout.

        Each rank that holds a part writes it into zeros, and a sum over all ranks joins them:
        exact, and every rank gets the same bits, so that each can draw the same next token. Meant
        for a few positions or a few sequences.

        Args:
            tokens: [b, s], the same on every rank; ``s`` as the layout needs it (``round_up``).
            positions: which of the ``s`` to return.
        """
        b, s = tokens.shape
        wanted = torch.arange(s, device=tokens.device)[positions]
        shape = (b, len(wanted), self.vocab_size)
        whole = torch.zeros(shape, device=tokens.device)

        def collect(logits: Tensor, batch: dict[str, Tensor]) -> None:
            if parallel_state.get_data_parallel_rank() > 0:
                return  # these hold the same sequences again
            first = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
            width = max(0, min(logits.shape[-1], self.vocab_size - first))
            here = batch["positions"][0]
            at, row = torch.nonzero(wanted[:, None] == here[None, :], as_tuple=True)
            whole[:, at, first : first + width] = logits[:, row, :width].float()

        self.run([{"tokens": tokens}], collect)
        dist.all_reduce(whole)
        return whole


def _on_this_cp_rank(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    tokens = batch["tokens"]
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    group = parallel_state.get_context_parallel_group()
    whole = {**batch, "positions": positions.contiguous()}
    return get_batch_on_this_cp_rank(whole, is_hybrid_cp=False, cp_group=group)


def load_model(directory: Path, args: Namespace) -> InferenceModel:
    """Build the model of ``args`` at the layout in force and fill it from a checkpoint.

    Args:
        directory: an ``iter_*`` directory, saved at any layout.
        args: from ``model_args``.
    """
    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = model_config_from_args(args)
    stages = K2ModelBuilder(config).build_distributed_models(
        groups, wrap_with_ddp=False, data_parallel_random_init=False
    )
    model = stages[0]
    metadata = {
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state = model.sharded_state_dict(metadata=metadata)
    loaded = dist_checkpointing.load(state, str(directory))
    # What a checkpoint lacks has failed in load(); _extra_state belongs to Transformer Engine.
    model.load_state_dict({key: loaded[key] for key in state}, strict=False)
    model.eval()
    return InferenceModel(stages, args.vocab_size)
