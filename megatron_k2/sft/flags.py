"""``megatron-k2 sft``'s command line as Megatron's flags: fine-tuning's defaults, the sets' length.

A preset's flags come first, fine-tuning's after them, what the user typed last; the last one wins.
``--data`` names packed sets here. ``--epochs`` is spelled out as samples, of which one is a pack.
"""

import math
from collections.abc import Sequence

from megatron_k2.errors import UserError
from megatron_k2.flags.megatron import SFT_DATA, check_vocabulary
from megatron_k2.flags.megatron import expand as expand_pretraining
from megatron_k2.flags.schedule import FRACTION, ITERATION_FLAGS
from megatron_k2.flags.words import last_value, take
from megatron_k2.presets import get_preset
from megatron_k2.sft.packed_set import Sequences
from megatron_k2.sft.sets import has_split, open_set, row_multiple, weighted_directories

EPOCHS = 2.0
"""As Moonlight (arXiv:2502.16982) fine-tuned; K2's are not published."""
GLOBAL_BATCH_SIZE = 64
"""Packs a step; a choice, K2's is not published."""
WARMUP_STEPS = 10
LR, MIN_LR = 2e-5, 2e-6
"""For a model that Muon pretrained; Moonlight went from 5e-5 to 0. 2e-4 is for toy models only."""

DEFAULTS = (
    f"--micro-batch-size 1 --lr {LR:g} --min-lr {MIN_LR:g} --lr-decay-style cosine "
    "--moe-router-load-balancing-type none --moe-aux-loss-coeff 0"
).split()
"""The balance loss is off: Megatron's is a mean over a row, whatever documents share it. The
router's bias goes on balancing loads, of which padding is no part."""


def expand(argv: list[str], *, cuda: bool) -> list[str]:
    """The plain flag list of a fine-tuning run.

    Args:
        argv: what the user typed.
        cuda: whether this machine has CUDA.

    Raises:
        UserError: no data, data of another vocabulary, or what ``flags.megatron.expand`` refuses.
    """
    words, typed = _take_data(argv)
    epochs, typed = take(typed, "--epochs")
    flags = [*DEFAULTS, SFT_DATA, *words, *_start(typed)]
    if not _is_settled(typed):
        flags += _from_sets(words, typed, _positive("--epochs", epochs, EPOCHS))
    return expand_pretraining([*flags, *typed], cuda=cuda)


def _is_settled(typed: Sequence[str]) -> bool:
    """Whether nothing is left to ask the sets for, as in a recipe, which they may be far from."""
    needed = ("--null-tokenizer-eod-id", "--eval-iters", "--lr-warmup-samples", "--train-samples")
    return all(last_value(typed, name) is not None for name in needed)


def _from_sets(words: Sequence[str], typed: Sequence[str], epochs: float) -> list[str]:
    """What the sets decide: ids, length of the run, whether there is something to evaluate on."""
    sets = _open(words, typed)
    preset = last_value(typed, "--preset")
    size = _number(typed, "--vocab-size") or (get_preset(preset).vocab_size if preset else 0)
    for one in sets:
        check_vocabulary(one.tokenizer, size, preset)
    eod = str(sets[0].tokenizer.eod_id)
    flags = ["--tokenizer-type", "NullTokenizer", "--null-tokenizer-eod-id", eod]
    flags += ["--vocab-size", str(size), *_schedule(typed, sum(map(len, sets)) * epochs)]
    return [*flags, *_evaluation(words, typed)]


def _take_data(argv: list[str]) -> tuple[list[str], list[str]]:
    """Words of ``--data`` or ``--sft-data``, and what else was typed."""
    found: list[str] = []
    rest: list[str] = []
    into = rest
    for word in argv:
        name, _, value = word.partition("=")
        if name in ("--data", SFT_DATA):
            found, into = [value] if value else [], found
            into = found
        elif word.startswith("--"):
            into = rest
            rest.append(word)
        else:
            into.append(word)
    if not found:
        raise UserError(
            "no --data: a directory of 'megatron-k2 data chat' is expected, or weights and "
            "directories, alternating"
        )
    return found, rest


def _open(words: Sequence[str], typed: Sequence[str]) -> list[Sequences]:
    """The training sets, packed for this run's sequences."""
    preset = last_value(typed, "--preset")
    default = get_preset(preset).training.seq_length if preset else 0
    capacity = int(_number(typed, "--seq-length") or default)
    if not capacity:
        raise UserError("missing --seq-length; give it, or --preset NAME")
    multiple = row_multiple(int(_number(typed, "--context-parallel-size") or 1))
    return [
        open_set(directory, "train", capacity=capacity, multiple=multiple)
        for _, directory in weighted_directories(words)
    ]


def _start(typed: Sequence[str]) -> list[str]:
    """Weights alone of what ``--load`` names: steps, samples and momentum begin anew."""
    is_given = last_value(typed, "--load") is not None and "--finetune" not in typed
    return ["--finetune"] if is_given else []


def _schedule(typed: Sequence[str], num_packs: float) -> list[str]:
    """Whole batches over ``num_packs``, where the user has not said how long; a short warm-up."""
    batch = int(_number(typed, "--global-batch-size") or GLOBAL_BATCH_SIZE)
    flags = ["--global-batch-size", str(batch)]
    in_iterations = [name for name in ITERATION_FLAGS if last_value(typed, name) is not None]
    steps = _number(typed, "--train-iters") or max(1, math.ceil(num_packs / batch))
    if (samples := _number(typed, "--train-samples")) is not None:
        steps = max(1, samples // batch)
    if in_iterations:
        flags += [] if "--train-iters" in in_iterations else ["--train-iters", str(int(steps))]
        flags += ["--lr-decay-iters", str(int(steps))]
    else:
        flags += ["--train-samples", str(int(steps) * batch)]
        flags += ["--lr-decay-samples", str(int(steps) * batch)]
    if last_value(typed, FRACTION) is not None:
        return flags
    warmup = min(WARMUP_STEPS, int(steps) // 10)
    if in_iterations:
        return [*flags, "--lr-warmup-iters", str(warmup)]
    return [*flags, "--lr-warmup-samples", str(warmup * batch)]


def _evaluation(words: Sequence[str], typed: Sequence[str]) -> list[str]:
    """No evaluation where no set has a ``valid`` split; one asked for nevertheless is refused."""
    sets = [directory for _, directory in weighted_directories(words)]
    if any(has_split(one, "valid") for one in sets):
        return []
    if (asked := _number(typed, "--eval-iters")) is not None and asked > 0:
        raise UserError(
            f"--eval-iters {asked}: no set of --data has a 'valid' split to evaluate on "
            f"({', '.join(map(str, sets))}); prepare one with 'megatron-k2 data chat "
            "--validation-fraction F', or give --eval-iters 0"
        )
    return ["--eval-iters", "0"]


def _number(typed: Sequence[str], name: str) -> int | None:
    text = last_value(typed, name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name} {text}: expected a whole number") from None


def _positive(name: str, text: str | None, default: float) -> float:
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = 0.0
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{name} {text}: expected a number above 0")
    return value
