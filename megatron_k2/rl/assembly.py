"""A run put together from parsed arguments: model, optimizer, learner, engine's side, records."""

import asyncio
import sys
from argparse import Namespace
from collections.abc import Callable, Coroutine
from typing import Any

import torch

from megatron_k2.checkpoint.hf.config import preset_from_args
from megatron_k2.errors import UserError
from megatron_k2.host.torchrun import end
from megatron_k2.presets import ModelPreset, get_preset
from megatron_k2.rl.learner import Learner
from megatron_k2.rl.loop import Iteration, Side, rested, run
from megatron_k2.rl.recorder import Recorder
from megatron_k2.rl.settings import LearnerSettings, settings_from
from megatron_k2.rl.waiting import (
    EXIT_CODE,
    EndAsked,
    LostError,
    end_within,
    waiting_of_ranks,
)
from megatron_k2.sft.dataset import Packs
from megatron_k2.sft.sets import open_packs, row_multiple
from megatron_k2.training.hooks import TrainingHooks
from megatron_k2.weight_sync.source import WeightSource

MakeSide = Callable[[Namespace, ModelPreset, int], Coroutine[Any, Any, Side]]
"""Of parsed arguments, the model, and the iteration that the learner goes on with; on rank 0, when
the model is built."""


def learn(config: Any, make_side: MakeSide, hooks: TrainingHooks) -> None:
    """A whole run, on every rank; inside ``training_hooks``.

    Args:
        config: Megatron's container of configurations.
        make_side: of what rank 0 has beside its part of the model.
        hooks: entered.
    """
    args = hooks.args
    learner = build(config, hooks, settings_from(args))
    recorder = Recorder(args, learner.number, learner.iteration, hooks.terminal)
    try:
        asyncio.run(_run(args, learner, make_side, recorder.show))
    except LostError as error:
        print(error, file=sys.stderr, flush=True)  # the rank's log
        if args.rank in (0, args.world_size - 1):
            print(f"rl: rank {args.rank} ends, {error}", file=hooks.terminal, flush=True)
        end(EXIT_CODE)


async def _run(
    args: Namespace, learner: Learner, make_side: MakeSide, show: Callable[[Iteration], None]
) -> None:
    waiting = waiting_of_ranks(_asked_to_end(args))
    preset = preset_from_args(args, _preset_of(args))
    source = WeightSource(
        learner.stages, preset, dtype=torch.bfloat16 if args.bf16 else torch.float32
    )
    work = make_side(args, preset, learner.iteration) if args.rank == 0 else None
    side = None
    try:
        side = await rested(waiting, learner, "what samples and scores", work)
        await run(learner, source, side, waiting=waiting, iterations=args.iterations, show=show)
    except EndAsked:
        return  # nothing was learnt yet
    except LostError:
        end_within()
        raise
    finally:
        if side is not None:
            await side.collector.close()


def _asked_to_end(args: Namespace) -> Callable[[], bool]:
    """Whether this rank got the signal of ``--exit-signal-handler``."""
    from megatron.training import get_signal_handler

    if not args.exit_signal_handler:
        return lambda: False
    return lambda: bool(get_signal_handler()._signal_received)


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
