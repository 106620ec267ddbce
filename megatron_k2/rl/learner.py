"""The trainer's side of an iteration: pi_old of what was sampled, then a step a mini-batch.

Model and optimizer are Megatron's (``setup_model_and_optimizer`` with this package's hooks), its
schedules run every pass, its functions save and load.
"""

import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from megatron_k2.optimizer.forget import forget
from megatron_k2.rl.batch import Batch, Room, plan
from megatron_k2.rl.learnt import Learnt, Mismatch
from megatron_k2.rl.micro_batch import MicroBatch, micro_batch
from megatron_k2.rl.old_logprobs import mismatch, old_logprobs
from megatron_k2.rl.phases import Phases
from megatron_k2.rl.record import Group
from megatron_k2.rl.replay import Replay
from megatron_k2.rl.rows import Rows, rows
from megatron_k2.rl.settings import LearnerSettings
from megatron_k2.rl.update import Stepper
from megatron_k2.sft.dataset import Pack, Packs
from megatron_k2.sft.sets import row_multiple
from megatron_k2.training.hooks import TrainingHooks

MOST_DIFFERENCE = {"fp32": 1e-4, "bf16": 0.1}
"""Nats a token between an engine's probes and the trainer, on average. In fp32 1e-7 was seen, and
4e-4 of an engine with YaRN under a trainer without; the other is where the rail ``mismatch`` is."""


PACK_UNIT = 64
"""Rows that a tensor-parallel rank's share of a pack is a multiple of; ours, and enough for FP8."""


class Ended(NamedTuple):
    """The end of an iteration."""

    is_saved: bool
    """It is in a checkpoint that is whole."""
    must_end: bool
    """Megatron's ``--exit-...`` flags: a signal, the duration, an interval."""


class Learner:
    """What trains, on every rank; all methods are collective.

    Args:
        args: Megatron's and ours.
        hooks: through which the optimizer was built.
        built: model chunks, optimizer and scheduler of ``setup_model_and_optimizer``.
        settings: of the objective and what goes with it.
        ptx: the stream of curated packs; ``None``: there is none.
    """

    def __init__(
        self,
        args: Namespace,
        hooks: TrainingHooks,
        built: tuple[list[Any], Any, Any],
        settings: LearnerSettings,
        ptx: Packs | None = None,
    ) -> None:
        self._args, self._hooks, self._settings, self._ptx = args, hooks, settings, ptx
        self.stages = built[0]
        config, group = get_model_config(self.stages[0]), mpu.get_tensor_model_parallel_group()
        self._num_parts = group.size() if config.sequence_parallel else 1
        self._replay, self._told_unrecorded = None, False
        if settings.replays_routes:
            split = group if self._num_parts > 1 else None
            self._replay = Replay(self.stages, config.moe_layer_freq, split)
        self._stepper = Stepper(args, hooks, built, settings.objective, self._replay)
        is_interleaved = len(self.stages) > 1
        self._room = Room(
            num_rows=args.seq_length,
            num_ranks=mpu.get_data_parallel_world_size(),
            multiple=row_multiple(args.context_parallel_size),
            count_multiple=args.pipeline_model_parallel_size if is_interleaved else 1,
            shares_prompts=settings.shares_prompts and can_share_prompts(args),
            unit=_unit(args),
        )
        is_moved = args.offload_in_rollout
        self._phases = Phases(self.stages, self._stepper.optimizer) if is_moved else None
        self.most_difference = MOST_DIFFERENCE["bf16" if args.bf16 else "fp32"]
        """Of an engine, see ``compare``."""
        self.number = int(args.iteration)
        """Mini-batches behind the weights, those without a step included: Megatron's iteration."""

    @property
    def iteration(self) -> int:
        """The next one, from 0."""
        return self.number // self._settings.mini_batches

    @property
    def version(self) -> int:
        """Optimizer steps behind the weights."""
        return self._stepper.version

    def learn(self, groups: Sequence[Group], lessons: Sequence[Pack] = ()) -> Learnt:
        """One iteration: pi_old of every mini-batch by today's weights, then their steps.

        Args:
            groups: the same on every rank.
            lessons: a critic's packs, likewise; dealt out to the mini-batches.

        Raises:
            UserError: answers that do not fit a pack, or of another model.
        """
        if self._settings.resets_optimizer:
            forget(self._stepper.optimizer)
        begin = time.perf_counter()
        count = self._settings.mini_batches
        batches = [
            self._planned(part, i, lessons[i::count]) for i, part in enumerate(self._parts(groups))
        ]
        prepared = [self._prepared(batch) for batch in batches]
        flat = [micro for micros in prepared for micro in micros]
        found = mismatch(flat)
        middle = time.perf_counter()
        updates = []
        for batch, micros in zip(batches, prepared, strict=True):
            self.number += 1
            updates.append(self._stepper.step(batch, micros, self.number))
        return Learnt(found, tuple(updates), middle - begin, time.perf_counter() - middle)

    def rest(self, *, keeps_weights: bool) -> None:
        """Give memory away until ``wake``, where ``--offload-in-rollout`` says so.

        Args:
            keeps_weights: see ``Phases.rest``.
        """
        if self._phases is not None:
            self._phases.rest(keeps_weights=keeps_weights)

    def wake(self) -> None:
        """Take it again: before anything else is asked of this learner, or of its ranks."""
        if self._phases is not None:
            self._phases.wake()

    def compare(self, groups: Sequence[Group]) -> Mismatch:
        """Today's weights against what an engine says of the same tokens; nothing is learnt.

        Args:
            groups: the same on every rank, tokens of today's version.
        """
        return mismatch(self._prepared(plan(groups, self._room, self.version)))

    def _parts(self, groups: Sequence[Group]) -> list[Sequence[Group]]:
        """Mini-batches, by ordinal; groups of one stay together."""
        ordered = sorted(groups, key=lambda group: group.ordinal)
        count = self._settings.mini_batches
        cuts = [len(ordered) * i // count for i in range(count + 1)]
        return [ordered[cuts[i] : cuts[i + 1]] for i in range(count)]

    def _planned(self, groups: Sequence[Group], place: int, lessons: Sequence[Pack]) -> Batch:
        size = self._settings.ptx_packs if self._ptx is not None else 0
        first = (self.number + place) * size
        return plan(
            groups,
            self._room,
            self.version,
            keeps_old=self._settings.objective.keeps_old,
            ptx=[self._ptx[first + i] for i in range(size)] if self._ptx is not None else (),
            lessons=lessons,
        )

    def _prepared(self, batch: Batch) -> list[MicroBatch]:
        """This rank's packs, with pi_old on the last stage."""
        if not batch.is_live:
            return []
        keeps_old, replays = self._settings.objective.keeps_old, self._replay is not None
        mine = batch.shares[mpu.get_data_parallel_rank()]
        packs = [
            rows(each, replace(self._room, num_rows=size), batch.version, keeps_old=keeps_old)
            for each, size in zip(mine, batch.sizes, strict=True)
        ]
        self._tell_unrecorded(packs)
        micros = [micro_batch(each, replays=replays, num_parts=self._num_parts) for each in packs]
        olds = old_logprobs(
            get_forward_backward_func(), self.stages, micros, self._replay, self._args.seq_length
        )
        return [micro.with_old(old) for micro, old in zip(micros, olds, strict=True)]

    def _tell_unrecorded(self, packs: Sequence[Rows]) -> None:
        """Once: where routes should be replayed and the engine has sent none."""
        if self._replay is None or not self._replay.num_layers or self._told_unrecorded:
            return
        if missing := sum(each.routes is None and len(each.lengths) > 0 for each in packs):
            self._told_unrecorded = True
            print(
                f"rl: rank {self._args.rank}: {missing} of {len(packs)} packs have no routes on "
                "record, so that routers choose anew; have the engine return routed experts "
                "(vLLM: --enable-return-routed-experts), or say --no-router-replay",
                file=self._hooks.terminal,
                flush=True,
            )

    def end_iteration(self, *, is_last: bool) -> Ended:
        """Save where it is due, by Megatron's functions and flags, and decide whether to go on.

        Args:
            is_last: of the run, which is saved in any case.

        Raises:
            UserError: a checkpoint could not be written.
        """
        from megatron.training import training

        state = (self.stages, self._stepper.optimizer, self._stepper.scheduler)
        num_flops = self._args.num_floating_point_operations_so_far
        must_end = training.checkpoint_and_decide_exit(*state, self.number, num_flops, {}, None)
        if is_last:
            self.save_now()
        return Ended(self._hooks.last_save == self.number, must_end)

    def save_now(self) -> None:
        """Save what is behind the last iteration, unless it is: started with, or saved since.

        Raises:
            UserError: the checkpoint could not be written.
        """
        from megatron.training import training

        saved = self._hooks.last_save or int(self._args.iteration)
        if not self._args.save or saved == self.number:
            return
        state = (self.stages, self._stepper.optimizer, self._stepper.scheduler)
        num_flops = self._args.num_floating_point_operations_so_far
        training.save_checkpoint_and_time(self.number, *state, num_flops, {})


def can_share_prompts(args: Namespace) -> bool:
    """Whether the model computes documents that go on from others.

    Transformer Engine's attention and context parallelism do not, fused rotary embeddings begin
    every document at 0, and a prediction layer asks a prompt's last rows for tokens that differ.
    """
    is_ours = args.transformer_impl == "local" and not args.apply_rope_fusion
    return is_ours and args.context_parallel_size == 1 and not args.mtp_num_layers


def _unit(args: Namespace) -> int:
    """Rows that a pack's size is a multiple of where it may end early, else 0.

    Pipeline stages, context parallelism and captured graphs want one size.
    """
    is_split = args.pipeline_model_parallel_size > 1 or args.context_parallel_size > 1
    is_captured = args.cuda_graph_impl != "none"
    return 0 if is_split or is_captured else PACK_UNIT * args.tensor_model_parallel_size
