"""One optimizer step over a batch of packs, as Megatron's ``train_step`` takes it.

What Megatron's own has no place for is here: a batch of another size each step, and no step at all
where nothing can be learnt.

**No live group, no step.** Muon ignores the size of a gradient: over a batch whose groups are all
dead, or of PTX alone, it would still move every matrix at full length. Such a batch runs no pass,
and leaves weights, optimizer and schedule as they are.
"""

import dataclasses
import sys
import time
from argparse import Namespace
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.rerun_state_machine import RerunDataIterator, get_rerun_state_machine
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_k2.rl.batch import Batch
from megatron_k2.rl.learnt import Measured, Update
from megatron_k2.rl.micro_batch import MicroBatch
from megatron_k2.rl.old_logprobs import everyones
from megatron_k2.rl.replay import Replay
from megatron_k2.rl.settings import Objective
from megatron_k2.rl.step import SUMS, forward_step
from megatron_k2.run.metrics import StepRecord
from megatron_k2.training.hooks import TrainingHooks
from megatron_k2.training.step_log import StepLog


class Stepper:
    """Takes steps; collective over all ranks.

    Args:
        args: Megatron's and ours.
        hooks: through which the optimizer was built.
        built: model chunks, optimizer and scheduler of ``setup_model_and_optimizer``.
        objective: its constants.
        replay: of the same chunks, or ``None``.
    """

    def __init__(
        self,
        args: Namespace,
        hooks: TrainingHooks,
        built: tuple[list[Any], Any, Any],
        objective: Objective,
        replay: Replay | None,
    ) -> None:
        self._args, self._objective, self._replay = args, objective, replay
        self.stages, self.optimizer, self.scheduler = built
        _wire(get_model_config(self.stages[0]), args, self.stages, self.optimizer)
        self._record: StepRecord | None = None
        assert hooks.step_log is not None  # the optimizer is built
        assert hooks.max_logits is not None
        self._log = StepLog(args, self.stages, hooks.max_logits, self._take_record)
        self._log.chain, hooks.step_log = hooks.step_log.chain, self._log
        for stage in self.stages:
            stage.train()

    @property
    def version(self) -> int:
        """Optimizer steps behind the weights."""
        return int(self.scheduler.num_steps) // int(self._args.global_batch_size)

    def step(self, batch: Batch, micros: list[MicroBatch], number: int) -> Update:
        """The step of a mini-batch, or none.

        Args:
            batch: the same on every rank.
            micros: of this rank, with pi_old on the last pipeline stage.
            number: of the mini-batch, from 1.
        """
        self._args.curr_iteration = number - 1
        self._args.consumed_train_samples += self._args.global_batch_size
        is_taken, measured = False, None
        begin = time.perf_counter()
        if batch.is_live:
            reports = self._gradients(batch, micros)
            is_taken, grad_norm = self._optimizer_step()
            measured = self._recorded(batch, reports, number, grad_norm, is_taken=is_taken)
            seconds = time.perf_counter() - begin  # of this step alone, rollouts are not its own
            step = dataclasses.replace(
                measured.step, seconds=seconds, tokens_per_second=batch.num_tokens / seconds
            )
            measured = dataclasses.replace(measured, step=step)
        return Update(
            number=number,
            version=self.version,
            is_taken=is_taken,
            num_groups=batch.num_groups,
            num_live_groups=batch.num_live_groups,
            num_answers=batch.num_answers,
            num_trained_tokens=batch.num_trained,
            num_tokens=batch.num_tokens,
            num_saved=batch.num_saved,
            measured=measured,
        )

    def _gradients(self, batch: Batch, micros: list[MicroBatch]) -> list[dict[str, Tensor]]:
        """Gradients of the global batch, in the buffers; what each micro-batch reported."""
        rerun = get_rerun_state_machine()
        iterators = [RerunDataIterator(iter(micros)) for _ in self.stages]
        given = iterators if len(iterators) > 1 else iterators[0]
        reports: list[dict[str, Tensor]] = []
        while rerun.should_run_forward_backward(given):
            for stage in self.stages:
                stage.zero_grad_buffer()
            self.optimizer.zero_grad()
            reports = get_forward_backward_func()(
                forward_step_func=partial(
                    forward_step,
                    objective=self._objective,
                    whole=batch,
                    replay=self._replay,
                ),
                data_iterator=given,
                model=self.stages,
                num_microbatches=len(micros),
                seq_length=self._args.seq_length,
                micro_batch_size=1,
                forward_only=False,
            )
        _, must_exit, code = rerun.should_checkpoint_and_exit()
        if must_exit:  # a result that came out otherwise the second time
            sys.exit(code)
        return reports

    def _optimizer_step(self) -> tuple[bool, float]:
        """As Megatron's ``train_step`` ends; whether there was a step, and the gradients' norm."""
        from megatron.training.utils import (
            logical_and_across_model_parallel_group,
            reduce_max_stat_across_model_parallel_group,
        )

        is_taken, grad_norm, _ = self.optimizer.step()
        group = mpu.get_model_parallel_group()
        is_taken = logical_and_across_model_parallel_group(is_taken, group=group)
        grad_norm = reduce_max_stat_across_model_parallel_group(grad_norm, group=group)
        if is_taken:
            self.scheduler.step(increment=self._args.global_batch_size)
        return bool(is_taken), float(grad_norm or 0.0)

    def _recorded(
        self,
        batch: Batch,
        reports: list[dict[str, Tensor]],
        number: int,
        grad_norm: float,
        *,
        is_taken: bool,
    ) -> Measured:
        """What was measured, gathered at once: an iteration waits for its rollouts anyway."""
        found, tokens = _summed(reports), batch.num_trained
        nll = _mean(found["nll"], batch.num_ptx_targets)
        lesson_nll = _mean(found["lesson_nll"], batch.num_lesson_targets)
        loss = found["objective"] + self._objective.ptx_weight * (nll or 0.0)
        loss += self._objective.lesson_weight * (lesson_nll or 0.0)
        rate = self.optimizer.param_groups[0]["lr"]
        self._log.step({"lm loss": torch.tensor(loss)}, rate, number, not is_taken, grad_norm)
        self._log.flush()
        record, self._record = self._record, None
        assert record is not None  # ``flush`` gives it to ``_take_record``
        return Measured(
            loss=loss,
            objective=found["objective"],
            ptx_nll=nll,
            lesson_nll=lesson_nll,
            entropy=found["entropy"] / tokens,
            log_ratio=found["log_ratio"] / tokens,
            kl=found["kl"] / tokens,
            step=record,
        )

    def _take_record(self, record: StepRecord, _: Tensor) -> None:
        self._record = record


def _wire(config: Any, args: Namespace, stages: list[Any], optimizer: Any) -> None:
    """What Megatron's ``train`` tells its schedules before the first step."""
    from megatron.training import get_timers

    config.grad_scale_func, config.timers = optimizer.scale_loss, get_timers()
    if args.overlap_grad_reduce:
        hooks = [stage.no_sync for stage in stages]
        config.no_sync_func = hooks if len(hooks) > 1 else hooks[0]
        if args.align_grad_reduce:
            starts = [stage.start_grad_sync for stage in stages]
            config.grad_sync_func = starts if len(starts) > 1 else starts[0]
    get_timers()("interval-time", log_level=0).start(barrier=True)


def _mean(total: float, number: int) -> float | None:
    return total / number if number else None


def _summed(reports: list[dict[str, Tensor]]) -> dict[str, float]:
    """``SUMS`` of the global batch, on every rank."""
    own = torch.zeros(len(SUMS), dtype=torch.float64)
    for report in reports:
        own += report["sums"].double().cpu()
    return dict(zip(SUMS, everyones(own).tolist(), strict=True))
