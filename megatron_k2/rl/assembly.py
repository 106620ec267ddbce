"""A run put together from parsed arguments: model, optimizer, learner, engine's side, records."""

import asyncio
import dataclasses
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_k2.checkpoint.hf.config import preset_from_args
from megatron_k2.errors import UserError
from megatron_k2.presets import ModelPreset, get_preset
from megatron_k2.rl.learner import Learner
from megatron_k2.rl.learnt import Learnt, metrics
from megatron_k2.rl.loop import Iteration, Side, run
from megatron_k2.rl.settings import LearnerSettings, settings_from
from megatron_k2.run.metrics import METRICS_FILE, JsonLines, MetricsWriter, read_records
from megatron_k2.sft.dataset import Packs
from megatron_k2.sft.sets import open_packs, row_multiple
from megatron_k2.training.hooks import TrainingHooks
from megatron_k2.weight_sync.source import WeightSource

RL_METRICS_FILE = "rl_metrics.jsonl"
"""A line a mini-batch; what any training sees of a step is in ``metrics.jsonl``."""

MakeSide = Callable[[Namespace], Side]
"""Of parsed arguments, on rank 0, when the model is built."""


def learn(config: Any, make_side: MakeSide, hooks: TrainingHooks) -> None:
    """A whole run, on every rank; inside ``training_hooks``.

    Args:
        config: Megatron's container of configurations.
        make_side: of what rank 0 has beside its part of the model.
        hooks: entered.
    """
    args = hooks.args
    learner = build(config, hooks, settings_from(args))
    source = WeightSource(
        learner.stages,
        preset_from_args(args, _preset_of(args)),
        dtype=torch.bfloat16 if args.bf16 else torch.float32,
    )
    side = make_side(args) if args.rank == 0 else None
    is_last = args.rank == args.world_size - 1
    writer = _Writer(Path(args.save), learner.number) if args.save and is_last else None
    asyncio.run(
        run(
            learner,
            source,
            side,
            iterations=args.iterations,
            show=writer.write if writer is not None else lambda _iteration: None,
        )
    )


def _preset_of(args: Namespace) -> ModelPreset:
    if args.preset is None:
        raise UserError("missing --preset NAME: the engine is given weights by their public names")
    return get_preset(args.preset)


def build(config: Any, hooks: TrainingHooks, settings: LearnerSettings) -> Learner:
    """Megatron's model and optimizer, loaded, and the learner of them; inside ``training_hooks``.

    Args:
        config: Megatron's container of configurations.
        hooks: entered.
        settings: of the learner.
    """
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import training  # whose names a host redirects

    from megatron_k2.host.repairs import roll_packed_documents
    from megatron_k2.model.packed import next_in_document

    roll_packed_documents(next_in_document)
    config.model.packs_documents = True
    # verl #6432: without it the heads' loss, which Megatron adds for any labels, moves the trunk.
    config.model.transformer.mtp_detach_heads = True
    training.initialize_megatron()
    args = hooks.args
    training.set_jit_fusion_options(tp_size=args.tensor_model_parallel_size)
    built = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        checkpointing_context={},
        cfg_container=config,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    return Learner(args, hooks, built, settings, _ptx(args, settings))


def _ptx(args: Namespace, settings: LearnerSettings) -> Packs | None:
    """The stream of the whole run; what comes at a place hangs on the seed and the place alone."""
    if args.sft_data is None:
        return None
    return open_packs(
        args.sft_data,
        "train",
        args.train_iters * settings.ptx_packs,
        args.seed,
        capacity=args.seq_length,
        multiple=row_multiple(args.context_parallel_size),
    )


class _Writer:
    """An iteration's records, a line a mini-batch, on disk before the next iteration begins.

    Args:
        directory: of the run.
        number: of the last mini-batch that a resumed run has behind it.
    """

    def __init__(self, directory: Path, number: int) -> None:
        self._steps = MetricsWriter(directory)
        self._lines = JsonLines(directory / RL_METRICS_FILE)
        before = [r for r in read_records(directory / METRICS_FILE) if r.iteration <= number]
        self._num_tokens = before[-1].consumed_tokens if before else 0

    def write(self, found: Iteration) -> None:
        """Both files, TensorBoard and W&B where Megatron's flags ask for them."""
        learnt = found.learnt
        shared: dict[str, Any] = {
            "mismatch": dataclasses.asdict(learnt.mismatch),
            "old_seconds": learnt.old_seconds,
            "step_seconds": learnt.step_seconds,
            "sync_seconds": None if found.sync is None else found.sync.seconds,
        }
        for update in learnt.updates:
            fields = dataclasses.asdict(update)
            measured = fields.pop("measured") or {}
            if update.measured is not None:
                self._num_tokens += update.num_tokens
                step = update.measured.step
                self._steps.write(dataclasses.replace(step, consumed_tokens=self._num_tokens))
                del measured["step"]
            line = {"iteration": fields.pop("number"), "round": found.number}
            self._lines.append(line | fields | measured | shared)
        _draw(learnt)


def _draw(learnt: Learnt) -> None:
    """Curves, for whoever watches."""
    from megatron.training import get_tensorboard_writer, get_wandb_writer

    named, number = metrics(learnt), learnt.updates[-1].number
    if (tensorboard := get_tensorboard_writer()) is not None:
        for name, value in named.items():
            tensorboard.add_scalar(name, value, number)
    if (wandb := get_wandb_writer()) is not None:
        wandb.log(named, number)
