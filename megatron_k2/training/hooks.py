"""The two seams of ``megatron.training`` that have no argument: optimizer factory, step log.

``megatron.training.training`` calls both as module globals. ``training_hooks`` replaces them while
entered and puts them back.
"""

import contextlib
import math
import time
from argparse import Namespace
from collections.abc import Iterator
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_k2.optimizer.classification import classification_table
from megatron_k2.optimizer.domain import settings_from
from megatron_k2.optimizer.grad_scope import GradScopeChain
from megatron_k2.optimizer.max_logits import MaxLogits
from megatron_k2.optimizer.muonclip import adopt_distributed, adopt_plain, register
from megatron_k2.training.console import step_line
from megatron_k2.training.metrics import MetricsWriter, StepRecord


class TrainingHooks:
    """State shared by the two hooks of one run."""

    def __init__(
        self, args: Namespace, terminal: TextIO | None, writer: MetricsWriter | None
    ) -> None:
        self.args = args
        self.terminal = terminal
        self.writer = writer
        self.model: list[torch.nn.Module] = []
        self.max_logits: MaxLogits | None = None
        self.chain: GradScopeChain | None = None
        self._last_time = time.perf_counter()
        self._seconds_per_step: float | None = None

    def get_optimizer(self, original: Any, config: Any, model: list[Any], **kwargs: Any) -> Any:
        """Megatron's factory, with MuonClip registered for this model and norms decayed."""
        self.model = model
        self.max_logits = MaxLogits(model)
        if not self.args.muonclip:
            return original(config, model, **kwargs)
        # Megatron exempts norms and biases from weight decay; Moonlight (App. D) calls decay on
        # RMSNorm gains crucial. No overrides means everything decays.
        kwargs["config_overrides"] = {}
        settings = settings_from(self.args, model[0].config)
        if dist.get_rank() == 0:
            print(classification_table(model, settings.matrices))
        register(model, self.max_logits, settings)
        optimizer = original(config, model, **kwargs)
        if config.use_distributed_optimizer:
            self.chain = adopt_distributed(optimizer, model, self.max_logits, settings)
        else:
            self.chain = adopt_plain(optimizer, settings)
        self._last_time = time.perf_counter()
        return optimizer

    def log_step(self, original: Any, *positional: Any, **kwargs: Any) -> Any:
        """Megatron's ``training_log``, then our record of the same step."""
        result = original(*positional, **kwargs)
        loss_dict, _, learning_rate, iteration, _, _, is_skipped, grad_norm = positional[:8]
        record = self._record(loss_dict, learning_rate, iteration, is_skipped, grad_norm)
        if dist.get_rank() == dist.get_world_size() - 1:
            self._show(record)
        return result

    def _record(
        self, loss_dict: Any, learning_rate: Any, iteration: int, is_skipped: Any, grad_norm: Any
    ) -> StepRecord:
        from megatron.core import parallel_state

        args = self.args
        now = time.perf_counter()
        seconds, self._last_time = now - self._last_time, now
        mean = self._seconds_per_step
        self._seconds_per_step = seconds if mean is None else 0.9 * mean + 0.1 * seconds
        assert self.max_logits is not None
        if is_skipped or not args.muonclip:  # otherwise the step itself took them
            self.max_logits.take(parallel_state.get_data_parallel_group(with_context_parallel=True))
        logits, loads = self._tables()
        tokens = args.global_batch_size * args.seq_length
        loss = loss_dict.get("lm loss")
        adamw_norm = self.chain.adamw_grad_norm() if self.chain and not is_skipped else None
        return StepRecord(
            iteration=iteration,
            consumed_samples=args.consumed_train_samples,
            consumed_tokens=args.consumed_train_samples * args.seq_length,
            loss=math.nan if loss is None else float(loss),
            learning_rate=float(learning_rate or 0.0),
            grad_norm=float(grad_norm or 0.0),
            is_skipped=bool(is_skipped),
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            max_logit_per_layer=tuple(logits.amax(-1).tolist()),
            num_clipped_heads=0 if is_skipped else int((logits > self._threshold()).sum()),
            load_max_over_mean_per_layer=tuple(x for x in loads.tolist() if x > 0),
            adamw_grad_norm=adamw_norm,
        )

    def _threshold(self) -> float:
        return self.args.qk_clip_threshold if self.args.muonclip else math.inf

    def _tables(self) -> tuple[Tensor, Tensor]:
        """Maximum logits [layers, heads] and load max/mean [layers] of the whole model.

        Each rank fills in its own layers and heads; one MAX all-reduce over the world joins them.
        """
        from megatron.core import parallel_state
        from megatron.core.utils import get_model_config

        assert self.max_logits is not None
        from megatron_k2.model.moe import routers

        config = get_model_config(self.model[0])
        num_rows = config.num_layers + (config.mtp_num_layers or 0)
        table = torch.full(
            (num_rows, config.num_attention_heads + 1),
            -math.inf,
            device=self.max_logits.latest.device,
        )
        heads_here = self.max_logits.latest.shape[1]
        first_head = parallel_state.get_tensor_model_parallel_rank() * heads_here
        for attention, row in zip(self.max_logits.attentions, self.max_logits.latest, strict=True):
            table[attention.layer_number - 1, first_head : first_head + heads_here] = row
        loads = config.finalize_model_grads_func.loads
        for router, load in zip(routers(self.model), loads, strict=True):
            table[router.layer_number - 1, -1] = load.max() / load.mean()
        dist.all_reduce(table, op=dist.ReduceOp.MAX)
        return table[:, :-1], table[:, -1]

    def _show(self, record: StepRecord) -> None:
        if self.writer is not None:
            self.writer.write(record)
        _write_tensorboard(record)
        is_due = record.iteration % self.args.log_interval == 0 or record.iteration == 1
        if self.terminal is not None and is_due:
            last = self.args.train_iters
            print(step_line(record, last, self._seconds_per_step or 0.0), file=self.terminal)


def _write_tensorboard(record: StepRecord) -> None:
    from megatron.training import get_tensorboard_writer

    tensorboard = get_tensorboard_writer()
    if tensorboard is None:
        return
    tensorboard.add_scalar("train/loss", record.loss, record.iteration)
    tensorboard.add_scalar("train/tokens_per_second", record.tokens_per_second, record.iteration)
    tensorboard.add_scalar("optim/max_attn_logit", record.max_logit, record.iteration)
    tensorboard.add_scalar("optim/clipped_heads", record.num_clipped_heads, record.iteration)
    tensorboard.add_scalar("moe/load_max_over_mean", record.load_max_over_mean, record.iteration)


@contextlib.contextmanager
def training_hooks(hooks: TrainingHooks) -> Iterator[None]:
    """Route the optimizer factory and the step log of ``megatron.training`` through ``hooks``."""
    import megatron.training.training as training

    factory, log = training.get_megatron_optimizer, training.training_log
    training.get_megatron_optimizer = lambda config, model, **kwargs: hooks.get_optimizer(
        factory, config, model, **kwargs
    )
    training.training_log = lambda *args, **kwargs: hooks.log_step(log, *args, **kwargs)
    try:
        yield
    finally:
        training.get_megatron_optimizer, training.training_log = factory, log
