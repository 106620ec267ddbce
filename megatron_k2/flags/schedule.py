"""A preset's schedule, counted in iterations where the user counts so.

Presets count samples. Megatron refuses a run that counts both, so one of its iteration flags
displaces the preset's sample flags, all of them. What the user leaves open keeps the preset's
proportions: ``--train-iters N`` is the preset's whole curve, warm-up and final decay included, in N
steps, and ``--lr-decay-iters N`` in as many of a run as long as the preset's.
"""

from collections.abc import Sequence

from megatron_k2.errors import UserError
from megatron_k2.flags.words import last_value, take
from megatron_k2.presets import TrainingDefaults

_KINDS = ("train", "lr-warmup", "lr-decay", "lr-wsd-decay")
ITERATION_FLAGS = tuple(f"--{kind}-iters" for kind in _KINDS)
SAMPLE_FLAGS = tuple(f"--{kind}-samples" for kind in _KINDS)
FRACTION = "--lr-warmup-fraction"


def _given(words: Sequence[str], names: Sequence[str]) -> list[str]:
    return [name for name in names if last_value(words, name) is not None]


def displaced(preset_flags: list[str], typed: list[str], t: TrainingDefaults) -> list[str]:
    """``preset_flags`` with the schedule counted as ``typed`` counts it.

    Args:
        preset_flags: of the preset, in samples.
        typed: what the user typed, which comes after them.
        t: the preset's numbers.

    Raises:
        UserError: where the user counts in both, or gives the warm-up twice.
    """
    in_iterations = _given(typed, ITERATION_FLAGS)
    has_fraction = last_value(typed, FRACTION) is not None
    _check(typed, in_iterations, has_fraction)
    if in_iterations:
        for name in SAMPLE_FLAGS:
            preset_flags = take(preset_flags, name)[1]
        return preset_flags + _in_iterations(typed, t, has_fraction=has_fraction)
    return take(preset_flags, "--lr-warmup-samples")[1] if has_fraction else preset_flags


def _check(typed: list[str], in_iterations: list[str], has_fraction: bool) -> None:
    in_samples = _given(typed, SAMPLE_FLAGS)
    if in_iterations and in_samples:
        raise UserError(
            f"{in_iterations[0]} counts iterations and {in_samples[0]} samples; count the "
            "schedule in one of the two"
        )
    warmup = _given(typed, ("--lr-warmup-iters", "--lr-warmup-samples"))
    if has_fraction and warmup:
        raise UserError(f"{FRACTION} and {warmup[0]} both give the warm-up; drop one of the two")


def _in_iterations(typed: list[str], t: TrainingDefaults, *, has_fraction: bool) -> list[str]:
    """The iteration flags that the user left open."""
    batch = _number(typed, "--global-batch-size") or t.global_batch_size
    train = _number(typed, "--train-iters")
    decay = _number(typed, "--lr-decay-iters")
    flags: list[str] = []

    def add(name: str, iterations: float) -> int:
        flags.extend([name, str(round(iterations))])
        return round(iterations)

    if train is None:
        train = add("--train-iters", t.train_samples / batch)
    if decay is None:
        decay = add("--lr-decay-iters", train * t.lr_decay_samples / t.train_samples)
    if _number(typed, "--lr-warmup-iters") is None and not has_fraction:
        add("--lr-warmup-iters", decay * t.lr_warmup_samples / t.lr_decay_samples)
    if _number(typed, "--lr-wsd-decay-iters") is None:
        add("--lr-wsd-decay-iters", max(1.0, decay * t.lr_wsd_decay_samples / t.lr_decay_samples))
    return flags


def _number(words: list[str], name: str) -> int | None:
    text = last_value(words, name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name} {text}: expected a whole number") from None
