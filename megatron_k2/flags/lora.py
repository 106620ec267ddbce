"""Adapters on the command line: which run is their base, and what else they settle.

``--load`` names the weights to start from, as without adapters. Where those are a whole model they
become the base, by the very checkpoint (``--lora-base RUN/iter_NNNNNNN``): read when the model is
built, never saved again. Where they are adapters, Megatron loads them and their record says on
which base they stand.
"""

import argparse
from pathlib import Path

from megatron_k2.errors import UserError
from megatron_k2.flags.start import START_OVER
from megatron_k2.flags.words import last_value, take
from megatron_k2.model.lora.settings import TARGETS
from megatron_k2.run.flags import RunFlags
from megatron_k2.run.iterations import find_iteration, resumable_iteration
from megatron_k2.run.record import RUN_RECORD, read_run_record

RANK, BASE, BASE_FP8 = "--lora-rank", "--lora-base", "--lora-base-fp8"
_OTHERS = ("--lora-alpha", "--lora-targets", "--lora-dropout", BASE)
_OF_A_LOAD = ("--finetune", "--no-load-optim", "--no-load-rng", "--load-main-params-from-ckpt")
BIAS_RATE = "--moe-router-bias-update-rate"
"""The router's bias belongs to the frozen base, and no checkpoint of adapters holds it."""
BALANCE = "--moe-router-load-balancing-type"


def add_lora_arguments(group: argparse._ArgumentGroup) -> None:
    """Declare the flags of adapters."""
    group.add_argument(
        RANK,
        type=int,
        default=None,
        help="train adapters of this rank over frozen weights, those of --load (LoRA)",
    )
    group.add_argument(
        "--lora-alpha",
        type=float,
        default=None,
        help="the adapters' product counts alpha / rank times (default: twice the rank)",
    )
    group.add_argument(
        "--lora-targets",
        nargs="+",
        default=None,
        metavar="LINEAR",
        help=f"linears with adapters, of {', '.join(TARGETS)}; linear_fc1 or linear_fc2 alone is "
        "that of all three places (default: all)",
    )
    group.add_argument(
        "--lora-dropout",
        type=float,
        default=0.0,
        help="share of an adapter's input that training sets to zero",
    )
    group.add_argument(
        BASE_FP8,
        action="store_true",
        help="hold the frozen linears in block FP8, as released; widened where they are used",
    )
    group.add_argument(
        BASE,
        default=None,
        help="checkpoint of the frozen weights, where --load is not it; what --load expands to",
    )


def base_of(run: Path) -> str | None:
    """The checkpoint that the adapters in ``run`` stand on; ``None`` if it holds a whole model."""
    directory = run if (run / RUN_RECORD).exists() else run.parent
    words = read_run_record(directory).get("flags", [])
    if last_value(words, RANK) is None:
        return None
    return last_value(words, BASE)


def over_base(words: list[str], typed: list[str]) -> list[str]:
    """The flag list with the base of adapters named, and what goes with them; else as it is.

    Args:
        words: expanded so far.
        typed: the user's own among them.

    Raises:
        UserError: another base than the adapters'.
    """
    if last_value(words, RANK) is None:
        _refuse_without_rank(words)
        return words
    words = _with_base(words)
    settled = [BIAS_RATE, "0"]
    if last_value(typed, BALANCE) is None:  # a frozen router is not taught by it
        settled += [BALANCE, "none"]
    return [*words, *settled]


def check_base(flags: RunFlags) -> None:
    """Refuse adapters without weights to stand on.

    Raises:
        UserError: naming what was given, and the way out.
    """
    if flags.lora_base is not None:
        return
    given = flags.load or flags.pretrained_checkpoint
    found = "" if given is None or given == flags.save else f" ({given} is not there)"
    raise UserError(
        f"{RANK} without weights to stand on{found}: give --load RUN, a whole model's "
        "('megatron-k2 convert import' makes one of a release), or a run of adapters to go on from"
    )


def adapters_sentence(flags: RunFlags) -> str | None:
    """What a start with adapters says of itself; ``None`` without."""
    if flags.lora_rank is None:
        return None
    clip = ""
    if "--muonclip" in flags:
        clip = (
            "; QK-Clip is off, since it would scale rows of the frozen weights, which other "
            "adapters share and no product of low rank can scale (the largest logits are logged)"
        )
    return f"adapters of rank {flags.lora_rank} over {flags.lora_base}, which stays as it is{clip}"


def _refuse_without_rank(words: list[str]) -> None:
    for flag in (*_OTHERS, BASE_FP8):
        if flag in words:
            raise UserError(f"{flag} without {RANK}: give the adapters' rank, or drop {flag}")
    for flag in ("--load", "--pretrained-checkpoint", "--save"):
        given = last_value(words, flag)
        if given is not None and START_OVER not in words and base_of(Path(given)) is not None:
            raise UserError(
                f"{flag} {given} holds adapters alone: give {RANK} as they were trained with, or "
                "merge them first ('megatron-k2 convert export --merge-lora')"
            )


def _with_base(words: list[str]) -> list[str]:
    """The words with ``--lora-base`` once, and without a ``--load`` that named the base."""
    given, words = take(words, BASE)
    source, name = None, "--load"
    for flag in ("--pretrained-checkpoint", "--load"):
        if (value := last_value(words, flag)) is not None:
            source, name = value, flag
    base = None if given is None else _checkpoint(given)
    if source is not None and Path(source).exists() and not _is_own(source, words):
        theirs = base_of(Path(source))
        if theirs is None:
            at = last_value(words, "--ckpt-step")
            base = _checkpoint(source, at) if base is None else base
            words = take(take(words, name)[1], "--ckpt-step")[1]
            words = [word for word in words if word not in _OF_A_LOAD]
        elif base is not None and base != theirs:
            raise UserError(
                f"{name} {source}: its adapters stand on {theirs}, {BASE} is {base}; drop {BASE}"
            )
        else:
            base = theirs
    base = _as_begun(base, words)
    if base is None:  # ``check_base`` refuses it, where the run is; a recipe is written without
        return words
    return [*words, BASE, base]


def _is_own(source: str, words: list[str]) -> bool:
    save = last_value(words, "--save")
    return save is not None and Path(save).absolute() == Path(source).absolute()


def _checkpoint(run: str, at: str | None = None) -> str:
    return str(find_iteration(Path(run), None if at is None else int(at)).absolute())


def _as_begun(base: str | None, words: list[str]) -> str | None:
    """The base that the run in ``--save`` began on, if it has a checkpoint: a later one is not it.

    A command that names a run still training would otherwise move the base at each restart.
    """
    save = last_value(words, "--save")
    if save is None or START_OVER in words or resumable_iteration(Path(save)) is None:
        return base
    begun = base_of(Path(save))
    if begun is None:
        raise UserError(
            f"--save {save} holds a run without adapters; give another directory, or {START_OVER}"
        )
    if base is not None and Path(begun).parent != Path(base).parent:
        raise UserError(
            f"--save {save}: its adapters stand on {begun}, this command's on {base}; give the "
            f"same --load, another --save, or {START_OVER}"
        )
    return begun
