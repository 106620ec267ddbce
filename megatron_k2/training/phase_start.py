"""The first start of a phase: weights and optimizer of the run before it, a schedule of its own.

Megatron loads a run whole, with its samples and its schedule, or, from ``--pretrained-checkpoint``,
the weights alone. The report's learning rate goes through its phases without a jump (section 2.5);
whether its optimizer's state did is not stated, and an empty momentum would make the first steps of
a phase another length. ``--keep-optimizer`` takes momentum, moments, their step count and the fp32
weights along, and counts samples and steps from zero.

Masters and moments are stored by parameter, so the next phase may have another TP, PP, CP or DP.
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_k2.run.iterations import has_tracker


def starts_here(args: Namespace) -> bool:
    """Whether this start takes the optimizer of another run: the first one, not a resume."""
    is_first = args.load is None or not has_tracker(Path(args.load))
    return bool(args.keep_optimizer and args.pretrained_checkpoint and is_first)


def load_with_optimizer(
    load: Callable[..., Any],
    args: Namespace,
    model: Any,
    optimizer: Any,
    **kwargs: Any,
) -> tuple[int, int]:
    """Megatron's ``load_checkpoint`` of ``--pretrained-checkpoint`` but for its progress.

    Args:
        load: Megatron's.
        args: its arguments; counts of samples are set to zero.
        model: this rank's chunks.
        optimizer: MuonClip's chain, whose load leaves its groups' rates alone.
        **kwargs: of ``load``.

    Returns:
        Step and floating point operations, both 0.
    """
    from megatron.core.num_microbatches_calculator import update_num_microbatches

    # Without a scheduler to load into, the run's own stays at its beginning.
    load(model, optimizer, None, **{**kwargs, "load_arg": "pretrained_checkpoint"})
    args.consumed_train_samples = args.consumed_valid_samples = args.skipped_train_samples = 0
    update_num_microbatches(0, verbose=False)
    return 0, 0
