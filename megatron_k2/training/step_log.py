"""What a step's record is made of, gathered without holding the next step up.

Maximum logits lie with the rank that holds the head and the layer, loads with the stage that holds
the router. After a step each rank fills its part of one table and an asynchronous MAX all-reduce
over the world joins them; values are read when the next step ends. ``flush`` reads them at once:
before a checkpoint, so that no line is missing after a resume, and at the end.
"""

import math
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_k2.model.moe import routers
from megatron_k2.optimizer.muonclip_chain import MuonAdamWChain
from megatron_k2.optimizer.qk_clip.max_logits import MaxLogits
from megatron_k2.optimizer.step_statistics import GROUPS, PARTS
from megatron_k2.run.metrics import StepRecord


@dataclass(frozen=True)
class _Pending:
    """A step whose values are still under way."""

    iteration: int
    consumed_samples: int
    loss: Any
    learning_rate: float
    grad_norm: float
    is_skipped: bool
    seconds: float
    table: Tensor
    adamw_square_sum: Tensor | None
    update_sums: Tensor | None
    works: tuple[dist.Work | None, ...]


class StepLog:
    """Turns steps into records, one step late.

    Args:
        args: Megatron's.
        model: this rank's chunks.
        max_logits: of this rank, reduced over data and context parallel by the step itself.
        show: takes each record, in order, with the per-head maxima [layers, heads]; on every rank.

    Attributes:
        chain: MuonClip's chain of optimizers, which knows AdamW's gradient norm; None without it.
    """

    def __init__(
        self,
        args: Namespace,
        model: list[torch.nn.Module],
        max_logits: MaxLogits,
        show: Callable[[StepRecord, Tensor], None],
    ) -> None:
        self._args, self._model, self._max_logits, self._show = args, model, max_logits, show
        self._has_clip = args.muonclip and args.lora_rank is None
        self._in_mtp = {
            id(module)
            for chunk in model
            for name, module in chunk.named_modules()
            if "mtp" in name.split(".")
        }
        self.chain: MuonAdamWChain | None = None
        self._pending: _Pending | None = None
        self._last_time = time.perf_counter()

    def step(
        self, loss_dict: Any, learning_rate: Any, iteration: int, is_skipped: Any, grad_norm: Any
    ) -> None:
        """Start gathering this step's values; finish and show the previous step's."""
        from megatron.core import parallel_state

        now = time.perf_counter()
        seconds, self._last_time = now - self._last_time, now
        if is_skipped or not self._has_clip:  # otherwise the step itself took them
            self._max_logits.take(
                parallel_state.get_data_parallel_group(with_context_parallel=True)
            )
        chain = None if is_skipped else self.chain
        loss = loss_dict.get("lm loss")
        table = self._fill_table(chain, loss)
        works: list[dist.Work | None] = [
            dist.all_reduce(table, op=dist.ReduceOp.MAX, async_op=True)
        ]
        square_sum, update_sums = None, None
        if chain is not None:
            square_sum, work = chain.reduce_adamw_square_sum()
            works.append(work)
            reduction = chain.reduce_update_sums()
            if reduction is not None:
                update_sums, work = reduction
                works.append(work)
        self.flush()
        self._pending = _Pending(
            iteration=iteration,
            consumed_samples=self._args.consumed_train_samples,
            loss=loss,
            learning_rate=float(learning_rate or 0.0),
            grad_norm=float(grad_norm or 0.0),
            is_skipped=bool(is_skipped),
            seconds=seconds,
            table=table,
            adamw_square_sum=square_sum,
            update_sums=update_sums,
            works=tuple(works),
        )

    def flush(self) -> None:
        """Finish and show the step that is under way, if there is one."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        for work in pending.works:
            if work is not None:
                work.wait()
        logits, loads = pending.table[:-2, :-1], pending.table[:-2, -1]
        exchange, newton_schulz = pending.table[-2, : len(PARTS)].tolist()
        joined = float(pending.table[-1, 0])
        own = math.nan if pending.loss is None else float(pending.loss)
        square_sum = pending.adamw_square_sum
        tokens = self._args.global_batch_size * self._args.seq_length
        is_clipping = self._has_clip and not pending.is_skipped
        threshold = self._args.qk_clip_threshold if is_clipping else math.inf
        record = StepRecord(
            iteration=pending.iteration,
            consumed_samples=pending.consumed_samples,
            consumed_tokens=pending.consumed_samples * self._args.seq_length,
            loss=joined if math.isfinite(joined) else own,
            learning_rate=pending.learning_rate,
            grad_norm=pending.grad_norm,
            is_skipped=pending.is_skipped,
            seconds=pending.seconds,
            tokens_per_second=tokens / pending.seconds,
            max_logit_per_layer=tuple(logits.amax(-1).tolist()),
            num_clipped_heads=int(((logits > threshold) & logits.isfinite()).sum()),
            num_nonfinite_heads=int((logits.isnan() | (logits == math.inf)).sum()),
            smallest_clip_factor=_smallest_factor(logits, threshold),
            load_max_over_mean_per_layer=tuple(x for x in loads.tolist() if x > 0),
            adamw_grad_norm=None if square_sum is None else math.sqrt(float(square_sum)),
            update_rms=_update_rms(pending.update_sums),
            exchange_seconds=exchange if math.isfinite(exchange) else None,
            newton_schulz_seconds=newton_schulz if math.isfinite(newton_schulz) else None,
        )
        self._show(record, logits)

    def _fill_table(self, chain: MuonAdamWChain | None, loss: Any) -> Tensor:
        """[layers + 2, heads + 1]: this rank's maximum logits and, last, load max/mean; else -inf.

        The last row but one begins with the seconds of Muon's parts in the step, where they are
        watched; the last with the loss, which the last pipeline stage alone knows, where finite.
        """
        from megatron.core import parallel_state
        from megatron.core.utils import get_model_config

        config = get_model_config(self._model[0])
        latest = self._max_logits.latest
        num_rows = config.num_layers + (config.mtp_num_layers or 0)
        num_cols = config.num_attention_heads + 1
        table = latest.new_full((num_rows + 2, num_cols), -math.inf)
        if loss is not None:
            table[-1, 0] = torch.nan_to_num(torch.as_tensor(loss), -math.inf, -math.inf)
        if chain is not None:
            seconds = [chain.part_seconds(part) for part in PARTS]
            table[-2, : len(PARTS)] = torch.tensor(seconds, dtype=table.dtype)
        first_head = parallel_state.get_tensor_model_parallel_rank() * latest.shape[1]
        for attention, row in zip(self._max_logits.attentions, latest, strict=True):
            at = self._row(attention, config)
            table[at, first_head : first_head + latest.shape[1]] = row
        loads = config.finalize_model_grads_func.loads
        for router, load in zip(routers(self._model), loads, strict=True):
            table[self._row(router, config), -1] = load.max() / load.mean()
        return table

    def _row(self, module: Any, config: Any) -> int:
        """Decoder layers first, then multi-token prediction's, which are numbered from 1 again."""
        return int(module.layer_number) - 1 + (config.num_layers * (id(module) in self._in_mtp))


def _update_rms(sums: Tensor | None) -> dict[str, float] | None:
    """RMS by group that has parameters; see ``MuonAdamWChain.reduce_update_sums``."""
    if sums is None:
        return None
    rows = zip(GROUPS, sums.tolist(), strict=True)
    return {group: math.sqrt(total / numel) for group, (total, numel) in rows if numel}


def _smallest_factor(logits: Tensor, threshold: float) -> float:
    """Smallest γ of the step, 1 if nothing was clipped."""
    finite = logits[logits.isfinite()]
    largest = float(finite.max()) if finite.numel() else -math.inf
    return threshold / largest if largest > threshold else 1.0
