"""``torchrun -m megatron_k2.training.pretrain <flags>``: Megatron's own training loop, our model.

There is no loop here: flags are expanded, checked, parsed by Megatron, and handed to
``megatron.training.pretrain`` with a model config, a forward step and a data provider. A
``Program`` may bring a loop of its own; the start of a run is the same for all.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from megatron_k2.errors import UserError
from megatron_k2.flags.data import data_prefixes, make_synthetic
from megatron_k2.flags.lora import adapters_sentence
from megatron_k2.flags.megatron import add_k2_arguments, expand
from megatron_k2.flags.refusing import refusing
from megatron_k2.flags.start import START_OVER, start_sentence
from megatron_k2.flags.words import last_value
from megatron_k2.fp8.compute import choose_offload_version, choose_scale_format
from megatron_k2.host.torchrun import is_rank, refuse
from megatron_k2.lock.directory import hold
from megatron_k2.run.console import divert_output
from megatron_k2.run.flags import RunFlags, read_flags
from megatron_k2.run.iterations import repair_tracker
from megatron_k2.run.leftovers import remove_torn_checkpoints, set_run_aside
from megatron_k2.run.record import RUN
from megatron_k2.training.preflight import check_run, drop_damaged_index_cache, write_run_record
from megatron_k2.training.resume import check_resume

PROGRAM_START = time.time()


def _pretraining_providers() -> tuple[Any, Any]:
    from megatron_k2.training.providers import datasets_provider, forward_step

    return datasets_provider, forward_step


def _megatron_loop(config: Any, providers: tuple[Any, Any], _hooks: Any) -> None:
    from megatron.core.enums import ModelType
    from megatron.training import pretrain

    datasets_provider, forward_step = providers
    pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)


@dataclass(frozen=True)
class Program:
    """What a kind of training brings to a run; the rest is the same for all."""

    name: str
    """What its messages begin with."""
    expand: Callable[..., list[str]]
    """What was typed -> Megatron's flags, see ``flags.megatron.expand``."""
    check: Callable[[RunFlags, int], None]
    """Refuses what cannot run, given the ranks; see ``training.preflight.check_run``."""
    providers: Callable[[], tuple[Any, Any]]
    """Imports and returns what ``loop`` is given, for Megatron's its datasets provider and forward
    step."""
    prepare: Callable[[RunFlags], list[str]]
    """What rank 0 does before all others begin; returns what is to be said of the run."""
    arguments: Callable[[argparse.ArgumentParser], argparse.ArgumentParser] = add_k2_arguments
    """Declares what Megatron's parser does not know."""
    loop: Callable[[Any, tuple[Any, Any], Any], None] = _megatron_loop
    """The training itself: Megatron's configurations, what ``providers`` returned, the hooks, which
    are entered (``training.hooks.TrainingHooks``)."""


PRETRAIN = Program("pretrain", expand, check_run, _pretraining_providers, lambda _flags: [])


def single_process_environment() -> None:
    """What torchrun would have set, for one process started by hand.

    Nobody else has to find its store: port 0 is one that the system chooses as it is bound. One
    that was free a moment ago may be another process's by then.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
        )


def run(argv: list[str], program: Program = PRETRAIN) -> None:
    """Train with the flags in ``argv`` (``--preset`` and ``--data`` allowed) until done."""
    is_rank()  # refuses what another launcher left over
    single_process_environment()
    save = last_value(argv, "--save")
    if save is None or os.environ["RANK"] != "0":
        _run_logged(argv, save, program)
        return
    with hold(Path(save), RUN):
        _run_logged(argv, save, program)


def _run_logged(argv: list[str], save: str | None, program: Program) -> None:
    terminal = None
    if save is not None and last_value(argv, "--console") != "megatron":
        terminal = divert_output(Path(save) / "logs" / f"rank{os.environ['RANK']}.log")
    try:
        _run(argv, terminal, program)
    except UserError as error:
        if terminal is not None:
            refuse(program.name, error, terminal)
        raise
    except BaseException as error:
        if terminal is not None and not isinstance(error, SystemExit):
            traceback.print_exc(file=terminal)
        raise


def _run(argv: list[str], terminal: TextIO | None, program: Program) -> None:
    import torch

    from megatron_k2.host.cpu import megatron_host
    from megatron_k2.host.offload_repairs import (
        end_offload_chunk_with_its_groups,
        reload_after_offload,
    )
    from megatron_k2.host.repairs import (
        guard_checkpoint_worker,
        keep_checkpoint_queue_through_sigterm,
        norms_without_te,
        recompute_without_te,
        restore_distributed_optimizer_without_te,
        skip_helpers_compilation,
    )

    flags = read_flags(program.expand(argv, cuda=torch.cuda.is_available()))
    world_size = int(os.environ["WORLD_SIZE"])
    program.check(flags, world_size)
    choose_scale_format(flags.fp8_recipe)
    choose_offload_version(flags)
    if os.environ["RANK"] == "0":
        check_resume(flags)
        for line in [*_put_in_order(flags, world_size), *program.prepare(flags)]:
            print(line, file=terminal, flush=True)
    # ft_integration.setup() parses sys.argv again, so it must hold what Megatron understands.
    sys.argv = [sys.argv[0], *flags.words]
    with megatron_host():
        skip_helpers_compilation()
        recompute_without_te()
        norms_without_te()
        restore_distributed_optimizer_without_te()
        keep_checkpoint_queue_through_sigterm()
        guard_checkpoint_worker()
        if "--fine-grained-activation-offloading" in flags:
            end_offload_chunk_with_its_groups()
            reload_after_offload()
        _pretrain(terminal, program)


def _put_in_order(flags: RunFlags, world_size: int) -> list[str]:
    """What one rank does for all before the first collective; what is to be said of it."""
    sentences = (start_sentence(flags), adapters_sentence(flags))
    said = [sentence for sentence in sentences if sentence is not None]
    if flags.save is not None:
        save = Path(flags.save)
        if START_OVER in flags and flags.load != flags.save:
            aside = set_run_aside(save)
            said += [f"{START_OVER}: the run that was there is in {aside}"] if aside else []
        repair_tracker(save)
        said += remove_torn_checkpoints(save)
    drop_damaged_index_cache(data_prefixes(flags), flags.data_cache_path)
    if flags.vocab_size is not None:
        make_synthetic(flags, flags.vocab_size, flags.null_tokenizer_eod_id or 0)
    write_run_record(flags, world_size)
    return said


def _pretrain(terminal: TextIO | None, program: Program) -> None:
    from megatron.training import get_tokenizer, set_startup_timestamps
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from megatron_k2.model.build import model_config_from_args
    from megatron_k2.run.metrics import MetricsWriter
    from megatron_k2.run.report.summary import finish
    from megatron_k2.training.hooks import TrainingHooks, training_hooks

    providers = program.providers()
    set_startup_timestamps(program_start=PROGRAM_START, main_entry=time.time())
    args = parse_and_validate_args(extra_args_provider=refusing(program.arguments))
    if args.muonclip and not args.use_distributed_optimizer:
        args.optimizer = "muonclip"  # Megatron's closed list of choices is behind us
    model_config = model_config_from_args(args, get_tokenizer().vocab_size)
    config = pretrain_cfg_container_from_args(args, model_config)
    writer = MetricsWriter(Path(args.save)) if args.save else None
    hooks = TrainingHooks(args, terminal, writer)
    with training_hooks(hooks):
        program.loop(config, providers, hooks)
    if args.rank == args.world_size - 1:
        if (sentence := hooks.nothing_to_do()) is not None:
            print(sentence, file=terminal)
        elif terminal is not None:
            print(f"\n{finish(Path(args.save))}", file=terminal)


def main(program: Program = PRETRAIN) -> None:
    """Entry point of each rank."""
    try:
        run(sys.argv[1:], program)
    except UserError as error:
        sys.exit(refuse(program.name, error))


if __name__ == "__main__":
    main()
