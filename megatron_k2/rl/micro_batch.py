"""A pack on its way through the model: this rank's rows, and log-probabilities in place of logits.

Megatron's model takes an ``output_processor``, which is handed the last hidden states: the logits
become one log-probability a row before anything else can keep them.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import mpu
from torch import Tensor

from megatron_k2.model.packed import PackedDocuments, describe
from megatron_k2.rl.asked import AskedRows, asked_rows
from megatron_k2.rl.logprobs import token_logprobs
from megatron_k2.rl.replay import Replay
from megatron_k2.rl.rows import Rows


@dataclass(frozen=True)
class MicroBatch:
    """One pack; rows are [s / CP] of this context-parallel rank, on its device. See ``Rows``."""

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    packed: PackedDocuments
    sample: Tensor
    is_trained: Tensor
    is_current: Tensor
    temperature: Tensor
    behaviour: Tensor
    nll_weight: Tensor
    lesson_weight: Tensor
    routes: Tensor | None
    """On the host: of K2's 60 layers they are a kilobyte a token."""
    advantage: Tensor
    weight: Tensor
    lengths: Tensor
    asked: AskedRows
    is_tempered: bool
    """Some label was drawn at a temperature other than 1."""
    old: "Old | None" = None
    """The last pipeline stage alone has it."""

    @property
    def is_target(self) -> Tensor:
        """[s / CP] rows that are asked for anything."""
        return self.is_trained | (self.nll_weight > 0) | (self.lesson_weight > 0)

    def with_old(self, old: "Old | None") -> "MicroBatch":
        """The same, with pi_old."""
        return dataclasses.replace(self, old=old)


@dataclass(frozen=True)
class Old:
    """What the trainer said of a pack's labels at an iteration's start; [s / CP] fp32 each."""

    logprobs: Tensor
    """``log pi_old`` at the temperature that each was drawn at."""
    over_behaviour: Tensor
    """``log pi_old - log mu``, the engine's mu of the version that drew it. At temperature 1, the
    only one that engines report; that it stands for the ratio at another is an assumption of
    ours."""


_ROWS = (
    *("tokens", "labels", "position_ids", "sample", "is_trained", "is_current"),
    *("temperature", "behaviour", "nll_weight", "lesson_weight"),
)
_ANSWERS = ("advantage", "weight", "lengths")


def micro_batch(rows: Rows, *, replays: bool, num_parts: int) -> MicroBatch:
    """This rank's part of a pack, on its device.

    Args:
        rows: the whole pack.
        replays: whether routes on record are taken along.
        num_parts: tensor-parallel ranks that hidden rows are split over, 1 without sequence
            parallelism.
    """
    group = mpu.get_context_parallel_group()
    held = rows.layout.rows_of_rank(group.size(), group.rank())
    device = torch.device(torch.cuda.current_device())
    parts: dict[str, Any] = {
        name: torch.from_numpy(getattr(rows, name)[held]).to(device, non_blocking=True)
        for name in _ROWS
    }
    parts |= {name: torch.from_numpy(getattr(rows, name)).to(device) for name in _ANSWERS}
    is_asked = rows.is_trained | rows.is_current | (rows.nll_weight > 0) | (rows.lesson_weight > 0)
    packed = describe(rows.layout, held, device)
    packed.loss_weight = (parts["is_trained"] | (parts["nll_weight"] > 0)).sum()
    routes = None
    if replays and rows.routes is not None:
        routes = torch.from_numpy(rows.routes[held])
    return MicroBatch(
        **parts,
        packed=packed,
        routes=routes,
        asked=asked_rows(is_asked[held], num_parts, device),
        is_tempered=bool((rows.temperature != 1).any()),
    )


def forward(
    iterator: Iterator[MicroBatch],
    stage: torch.nn.Module,
    replay: Replay | None,
    processor: Callable[..., Tensor],
) -> tuple[Tensor, MicroBatch]:
    """The next micro-batch through a stage.

    Args:
        iterator: of this stage's micro-batches.
        stage: of the model, wrapped.
        replay: of the same stages; ``None``: routers choose.
        processor: ``scored`` or ``scored_twice``.

    Returns:
        Hidden states or, of the last stage, what ``processor`` makes of them; the micro-batch.
    """
    batch = next(iterator)
    if replay is not None:
        replay.begin(stage, batch.routes)
    output: Tensor = stage(
        batch.tokens[None],
        batch.position_ids[None],
        None,
        labels=batch.labels[None],
        loss_mask=batch.is_target[None].float(),  # of prediction layers alone
        packed_seq_params=batch.packed,
        output_processor=processor,
        output_processor_context=batch,
    )
    return output, batch


def scored(**given: Any) -> Tensor:
    """[2, s / CP] fp32: log-probability of each label at its temperature, entropy there.

    0 in rows that are not asked for; the same on every tensor-parallel rank. The entropy has no
    gradient.
    """
    batch: MicroBatch = given["context"]
    return batch.asked.spread(torch.stack(_logprobs(_logits(**given), batch, batch.temperature)))


def scored_twice(**given: Any) -> Tensor:
    """[2, s / CP] fp32: log-probability of each label at its temperature, and at 1."""
    batch: MicroBatch = given["context"]
    logits = _logits(**given)
    plain, _ = _logprobs(logits, batch, torch.ones_like(batch.temperature))
    drawn = plain
    if batch.is_tempered:
        drawn, _ = _logprobs(logits, batch, batch.temperature)
    return batch.asked.spread(torch.stack([drawn, plain]))


def _logits(
    *,
    context: MicroBatch,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    runtime_gather_output: bool | None,
    **_: Any,
) -> Tensor:
    """[asked rows, P / TP] of this tensor-parallel rank."""
    parts = context.asked.parts
    own = parts[mpu.get_tensor_model_parallel_rank() if len(parts) > 1 else 0]
    logits, _bias = output_layer(
        hidden_states.index_select(0, own),
        weight=output_weight,
        runtime_gather_output=runtime_gather_output,
    )
    return logits[:, 0]


def _logprobs(logits: Tensor, batch: MicroBatch, scale: Tensor) -> tuple[Tensor, Tensor]:
    group, rows = mpu.get_tensor_model_parallel_group(), batch.asked.rows
    return token_logprobs(
        logits, batch.labels[rows], scale[rows], group if group.size() > 1 else None
    )
