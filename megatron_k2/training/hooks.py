"""The seams of ``megatron.training`` that have no argument: optimizer, load, log, save, skip.

The step of the optimizer that Megatron's factory returns is guarded too: see ``_guard_step``.

``megatron.training.training`` calls them as module globals. ``training_hooks`` replaces them while
entered and puts them back.
"""

import contextlib
import functools
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from megatron_k2.optimizer.muonclip import build
from megatron_k2.optimizer.qk_clip.apply import refuse_silent
from megatron_k2.optimizer.qk_clip.max_logits import MaxLogits
from megatron_k2.optimizer.sharded.expert_layout import expert_layout
from megatron_k2.run.console import step_line
from megatron_k2.run.iterations import last_iteration
from megatron_k2.run.metrics import MetricsWriter, StepRecord
from megatron_k2.training.phase_start import load_with_optimizer, starts_here
from megatron_k2.training.resume import end_at_train_samples
from megatron_k2.training.spike_watch import SpikeWatch, meet_spike, skip_batch, take_skips
from megatron_k2.training.step_log import StepLog
from megatron_k2.training.unwritten import unwritten


class TrainingHooks:
    """State shared by the hooks of one run."""

    def __init__(
        self, args: Namespace, terminal: TextIO | None, writer: MetricsWriter | None
    ) -> None:
        self.args = args
        self.terminal = terminal
        self.writer = writer
        self.model: list[torch.nn.Module] = []
        self.max_logits: MaxLogits | None = None
        self.step_log: StepLog | None = None
        self._seconds_per_step: float | None = None
        self._has_stepped = False
        self._saved: list[int] = []
        """Steps of this run whose checkpoints were begun."""
        self._watch: SpikeWatch | None = None
        if args.on_spike != "off":
            self._watch = SpikeWatch(Path(args.save) if args.save else None, args.spike_nats)

    def get_optimizer(self, original: Any, config: Any, model: list[Any], **kwargs: Any) -> Any:
        """Megatron's factory, or MuonClip built by it (``optimizer.muonclip.build``)."""
        take_skips(self.args)
        self.model = model
        self.max_logits = MaxLogits(model)
        self.step_log = StepLog(self.args, model, self.max_logits, self._show)
        if not self.args.muonclip:
            return self._guard_step(original(config, model, **kwargs))
        load = self.args.pretrained_checkpoint if starts_here(self.args) else self.args.load
        chain = build(original, self.args, config, model, self.max_logits, load, **kwargs)
        self.step_log.chain = chain
        return self._guard_step(chain)

    def _guard_step(self, optimizer: Any) -> Any:
        """``optimizer``, whose step leaves everything alone where no token was to be learnt.

        The mean over no tokens is no number, and what gradient there is, of the balance loss,
        belongs to no token. To Megatron it is a step that was not successful. Only
        ``--eod-mask-loss`` and fine-tuning mask all of a training batch; other runs are spared the
        question, which makes the host wait for the device.
        """
        if not self.args.eod_mask_loss and self.args.sft_data is None:
            return optimizer
        from megatron.core.utils import get_model_config

        finalize = get_model_config(self.model[0]).finalize_model_grads_func
        step = optimizer.step

        def guarded() -> Any:
            if not finalize.is_batch_empty():
                return step()
            number = self.args.curr_iteration + 1
            self._say(f"step {number}: every token of the batch is masked; skipped, weights kept")
            return False, 0.0, 0

        optimizer.step = guarded
        return optimizer

    def load(self, original: Any, model: Any, optimizer: Any, scheduler: Any, **kwargs: Any) -> Any:
        """Megatron's load, and at the start of a phase the optimizer of the one before it."""
        if starts_here(self.args):
            return load_with_optimizer(original, self.args, model, optimizer, **kwargs)
        step, num_flops = original(model, optimizer, scheduler, **kwargs)
        end_at_train_samples(self.args, step)
        return step, num_flops

    def log_step(self, original: Any, *positional: Any, **kwargs: Any) -> Any:
        """Megatron's ``training_log``, then our record of the same step."""
        result = original(*positional, **kwargs)
        loss_dict, _, learning_rate, iteration, _, _, is_skipped, grad_norm = positional[:8]
        assert self.step_log is not None  # the optimizer was built before the first step
        self.step_log.step(loss_dict, learning_rate, iteration, is_skipped, grad_norm)
        if self.args.muonclip and not is_skipped and not self._has_stepped:
            self._has_stepped = True  # once: it waits for the device
            refuse_silent(self.max_logits.unrecorded() if self.max_logits is not None else [])
        return result

    def save(self, original: Any, *positional: Any, **kwargs: Any) -> Any:
        """Megatron's save, after the record of the step it holds is on disk.

        Raises:
            UserError: where the checkpoint could not be written: its file, size and disk.
        """
        self.flush()
        self._saved.append(int(positional[0]))
        try:
            return original(*positional, **kwargs)
        except (CheckpointException, OSError) as error:
            raise unwritten(Path(self.args.save), self._saved[-1], error) from error

    def finish_save(self, original: Any, *positional: Any, **kwargs: Any) -> Any:
        """Megatron's end of a save that goes on beside training (``--async-save``).

        Raises:
            UserError: where the checkpoint could not be written, as ``save`` does.
        """
        try:
            return original(*positional, **kwargs)
        except (CheckpointException, OSError) as error:
            last = last_iteration(Path(self.args.save)) or 0
            step = next(step for step in self._saved if step > last)  # they end in order
            raise unwritten(Path(self.args.save), step, error) from error

    @property
    def last_save(self) -> int | None:
        """Step of the last checkpoint that this run began; ``None`` before the first."""
        return self._saved[-1] if self._saved else None

    def nothing_to_do(self) -> str | None:
        """Why a run ended without a step, in a sentence; ``None`` if it took one or saved none."""
        args = self.args
        if args.skip_train or not 0 < args.iteration >= args.train_iters:
            return None
        ends = "--train-samples" if args.train_samples else "--train-iters"
        count = args.train_samples or args.train_iters
        return (
            f"nothing to do: {args.load} is at step {args.iteration}, where {ends} {count} ends "
            f"the run; raise it to train on"
        )

    def skip_batch(self, original: Any, data_iterator: Any) -> None:
        """Megatron's step over a batch that is left out, of any pipeline."""
        del original
        skip_batch(data_iterator)

    def flush(self) -> None:
        """Write and show what is still under way."""
        if self.step_log is not None:
            self.step_log.flush()

    def _show(self, record: StepRecord, max_logits: Tensor) -> None:
        mean = self._seconds_per_step
        self._seconds_per_step = (
            record.seconds if mean is None else 0.9 * mean + 0.1 * record.seconds
        )
        if dist.get_rank() == dist.get_world_size() - 1:
            self._write(record, max_logits)
        spike = self._watch.observe(record) if self._watch is not None else None
        if spike is not None:
            meet_spike(self.args, spike, self._say)

    def _write(self, record: StepRecord, max_logits: Tensor) -> None:
        is_due = record.iteration % self.args.log_interval == 0 or record.iteration == 1
        if self.writer is not None and is_due:
            self.writer.write_max_logits(record.iteration, max_logits.tolist())
        if self.writer is not None:
            self.writer.write(record)
        _write_tensorboard(record)
        if self.terminal is not None and is_due:
            last = self.args.train_iters
            print(step_line(record, last, self._seconds_per_step or 0.0), file=self.terminal)

    def _say(self, text: str) -> None:
        """A line from the last rank."""
        if dist.get_rank() == dist.get_world_size() - 1:
            print(text, file=self.terminal or sys.stdout, flush=True)


def _write_tensorboard(record: StepRecord) -> None:
    from megatron.training import get_tensorboard_writer

    tensorboard = get_tensorboard_writer()
    if tensorboard is None:
        return
    tensorboard.add_scalar("train/loss", record.loss, record.iteration)
    tensorboard.add_scalar("train/tokens_per_second", record.tokens_per_second, record.iteration)
    tensorboard.add_scalar("optim/max_attn_logit", record.max_logit, record.iteration)
    tensorboard.add_scalar("optim/clipped_heads", record.num_clipped_heads, record.iteration)
    for group, rms in (record.update_rms or {}).items():
        tensorboard.add_scalar(f"optim/update_rms/{group}", rms, record.iteration)
    for name in ("exchange_seconds", "newton_schulz_seconds"):
        seconds = getattr(record, name)
        if seconds is not None:
            tensorboard.add_scalar(f"optim/{name}", seconds, record.iteration)
    tensorboard.add_scalar("moe/load_max_over_mean", record.load_max_over_mean, record.iteration)


@contextlib.contextmanager
def training_hooks(hooks: TrainingHooks) -> Iterator[None]:
    """Route the optimizer factory and the step log of ``megatron.training`` through ``hooks``.

    With MuonClip over ZeRO, expert buffers are laid out by ``expert_layout`` meanwhile.
    """
    import megatron.training.training as training

    replaced = {
        name: getattr(training, name)
        for name in (
            *("get_megatron_optimizer", "load_checkpoint", "training_log"),
            *("save_checkpoint_and_time", "dummy_train_step", "maybe_finalize_async_save"),
        )
    }
    ours: tuple[Callable[..., Any], ...] = (
        *(hooks.get_optimizer, hooks.load, hooks.log_step),
        *(hooks.save, hooks.skip_batch, hooks.finish_save),
    )
    for (name, original), hook in zip(replaced.items(), ours, strict=True):
        setattr(training, name, functools.partial(hook, original))
    is_zero = hooks.args.muonclip and hooks.args.use_distributed_optimizer
    try:
        with expert_layout() if is_zero else contextlib.nullcontext():
            yield
        hooks.flush()
    finally:
        for name, original in replaced.items():
            setattr(training, name, original)
