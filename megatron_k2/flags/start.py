"""Which checkpoint a start reads: the run's own where it has one, else what it is given.

A run that starts from another one's checkpoint (``--load A --save B``) and is started again, by a
person or a requeue, must go on from its own last step: Megatron alone reads A again and repeats
those steps for ever. So a checkpoint in ``--save`` wins, and what says how A is read goes with it:
``--finetune`` would begin at step 0 each time. ``--start-over`` is the way back to A.
"""

from pathlib import Path

from megatron_k2.flags.words import last_value, take
from megatron_k2.run.flags import RunFlags
from megatron_k2.run.iterations import last_iteration, resumable_iteration

START_OVER = "--start-over"
RESUMED_WITHOUT = "--resumed-without"
"""What a start from the run's own checkpoint leaves out of the command, in words."""

_OF_ANOTHER_RUN = ("--no-load-optim", "--no-load-rng", "--load-main-params-from-ckpt")
"""How the checkpoint that ``--load`` names is read; beside ``--finetune`` and ``--ckpt-step``."""


def choose_checkpoint(words: list[str]) -> list[str]:
    """The flag list with the ``--load`` of this start; without ``--save`` as it is.

    Args:
        words: expanded so far.
    """
    save, load = last_value(words, "--save"), last_value(words, "--load")
    if save is None:
        return words
    is_own = load is not None and Path(load).absolute() == Path(save).absolute()
    if START_OVER in words:  # with --finetune, the run's own weights may be what it starts from
        return take(words, "--load")[1] if is_own and "--finetune" not in words else words
    if resumable_iteration(Path(save)) is None:
        return words if load is not None else [*words, "--load", save]
    left_out: list[str] = []
    if load is not None and not is_own:
        left_out.append(f"load {load}")
        words = take(words, "--load")[1]
        if last_value(words, "--ckpt-step") is not None:
            left_out.append("ckpt-step")
            words = take(words, "--ckpt-step")[1]
        left_out += [flag.removeprefix("--") for flag in _OF_ANOTHER_RUN if flag in words]
        words = [word for word in words if word not in _OF_ANOTHER_RUN]
    if "--finetune" in words:
        left_out.append("finetune")
        words = [word for word in words if word != "--finetune"]
    if left_out:
        words = [*words, RESUMED_WITHOUT, ", ".join(left_out)]
    return words if last_value(words, "--load") is not None else [*words, "--load", save]


def start_sentence(flags: RunFlags) -> str | None:
    """What this start reads and why; ``None`` for a run that begins from random weights.

    Args:
        flags: expanded; no rank has written to ``--save`` yet.
    """
    own = None if flags.save is None else resumable_iteration(Path(flags.save))
    if own is not None and flags.load == flags.save and START_OVER not in flags:
        without = flags.resumed_without
        note = f" ({START_OVER} starts anew)"
        if without is not None:
            note = f", so without {without} of the command ({START_OVER} starts from there again)"
        step = own if flags.ckpt_step is None else flags.ckpt_step
        return f"resuming from {flags.save}, step {step}: --save has a checkpoint of its own{note}"
    over = ""
    if own is not None and START_OVER in flags:
        over = f", not from step {own} of {flags.save} ({START_OVER})"
    for given in (flags.load, flags.pretrained_checkpoint):
        if given is not None and resumable_iteration(Path(given)) is not None:
            step = flags.ckpt_step or last_iteration(Path(given))
            return f"starting from {given}, step {step}{over}"
    return f"starting anew{over}" if over else None
