"""A resume against what its checkpoint was made with: samples that are left, and the schedule.

Megatron takes a run for ``--train-samples // --global-batch-size`` steps whatever it has consumed,
so that a batch changed on the way ends it too early or too late, and it ends a schedule that is not
the checkpoint's by a bare assertion, after the model is built.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint.torch_dist.reader import MegatronSource
from megatron_k2.errors import UserError
from megatron_k2.parallel.layout import nearest_multiples
from megatron_k2.run.flags import RunFlags
from megatron_k2.run.iterations import METADATA, find_iteration, resumable_iteration


def last_step(train_samples: int, consumed: int, batch: int, step: int) -> int:
    """The step after which ``train_samples`` are consumed, or as many as whole steps reach.

    Args:
        train_samples: of the whole run.
        consumed: up to ``step``.
        batch: samples of each step from here on.
        step: of the checkpoint; 0 at the beginning.
    """
    return step + max(0, train_samples - consumed) // batch


def end_at_train_samples(args: Namespace, step: int) -> None:
    """Set Megatron's last step by the samples that its load found consumed.

    Args:
        args: Megatron's, after the load.
        step: of the checkpoint.
    """
    if args.train_samples and args.step_batch_size_schedule is None:
        args.train_iters = last_step(
            args.train_samples, args.consumed_train_samples, args.global_batch_size, step
        )


def check_resume(flags: RunFlags) -> None:
    """Refuse a batch or a schedule that the checkpoint of a resume does not go on with.

    Args:
        flags: of the run, expanded.

    Raises:
        UserError: naming both sides and the way out.
    """
    common = _common_state(flags)
    saved = common.get("args")
    if saved is None:
        return
    if flags.train_samples is not None and flags.step_batch_size_schedule is None:
        _check_samples(flags, saved)
    state = common.get("opt_param_scheduler")
    is_kept = "--override-opt-param-scheduler" in flags or (
        "--use-checkpoint-opt-param-scheduler" in flags
    )
    if state is not None and "--no-load-optim" not in flags and not is_kept:
        _check_schedule(flags, state)


def _common_state(flags: RunFlags) -> dict[str, Any]:
    """What the checkpoint that a resume reads holds beside tensors; empty where there is none."""
    if flags.load is None or flags.finetune or resumable_iteration(Path(flags.load)) is None:
        return {}
    directory = find_iteration(Path(flags.load), flags.ckpt_step)
    return MegatronSource(directory).common if (directory / METADATA).is_file() else {}


def _check_samples(flags: RunFlags, saved: Namespace) -> None:
    """A changed batch must divide the samples that are left."""
    total, batch = flags.train_samples, flags.global_batch_size
    old, consumed = saved.global_batch_size, saved.consumed_train_samples
    assert total is not None
    if batch is None or batch == old or (total - consumed) % batch == 0 or consumed >= total:
        return
    left = total - consumed
    near = ", ".join(str(consumed + n) for n in nearest_multiples(left, batch))
    raise UserError(
        f"--global-batch-size {batch}: the checkpoint in {flags.load} was made with {old} and has "
        f"consumed {consumed:,} samples; the {left:,} that are left of --train-samples {total:,} "
        f"do not divide by {batch}. Go on with {old}, or with --train-samples {near}"
    )


def _check_schedule(flags: RunFlags, state: dict[str, Any]) -> None:
    """Megatron's ``OptimizerParamScheduler.load_state_dict`` compares the same."""
    own = schedule_of(flags)
    differing = [
        f"{flag} {state[name]} there, {value} here"
        for name, (flag, value) in own.items()
        if name in state and state[name] != value
    ]
    if differing:
        raise UserError(
            f"the checkpoint in {flags.load} has another schedule (steps in samples): "
            f"{'; '.join(differing)}. Give the same, --override-opt-param-scheduler to go on with "
            "this command's, or --use-checkpoint-opt-param-scheduler with the checkpoint's"
        )


def schedule_of(flags: RunFlags) -> dict[str, tuple[str, Any]]:
    """State of Megatron's scheduler under the names of its checkpoint, and the flag of each.

    As ``training.get_optimizer_param_scheduler`` derives it; lengths in samples.
    """
    batch = flags.global_batch_size or 1
    unit, scale = ("samples", 1) if flags.train_samples else ("iters", batch)
    length = flags.train_samples or (flags.train_iters or 0) * batch
    decay = flags.lr_decay_samples if flags.train_samples else flags.lr_decay_iters
    decay = length if decay is None else decay * scale
    warmup: float = flags.lr_warmup_samples if flags.train_samples else flags.lr_warmup_iters
    warmup *= scale
    if flags.lr_warmup_fraction is not None:
        warmup = flags.lr_warmup_fraction * decay
    is_constant = flags.weight_decay_incr_style == "constant"
    first = flags.weight_decay if is_constant else flags.start_weight_decay
    last = flags.weight_decay if is_constant else flags.end_weight_decay
    return {
        "max_lr": ("--lr", flags.lr),
        "min_lr": ("--min-lr", flags.min_lr),
        "lr_warmup_steps": (f"--lr-warmup-{unit}", warmup),
        "lr_decay_steps": (f"--lr-decay-{unit}", decay),
        "lr_decay_style": ("--lr-decay-style", flags.lr_decay_style),
        "start_wd": ("--weight-decay" if is_constant else "--start-weight-decay", first),
        "end_wd": ("--weight-decay" if is_constant else "--end-weight-decay", last),
        "wd_incr_steps": (f"--train-{unit}", length),
        "wd_incr_style": ("--weight-decay-incr-style", flags.weight_decay_incr_style),
    }


def check_schedule(flags: RunFlags) -> None:
    """Refuse a schedule that Megatron's scheduler would end by an assertion without words.

    Raises:
        UserError: naming both flags.
    """
    own = schedule_of(flags)
    (lr_flag, lr), (min_flag, min_lr) = own["max_lr"], own["min_lr"]
    (warmup_flag, warmup), (decay_flag, decay) = own["lr_warmup_steps"], own["lr_decay_steps"]
    if lr is not None and not 0 <= min_lr <= lr:
        raise UserError(f"{min_flag} {min_lr:g}: expected from 0 to {lr_flag} {lr:g}")
    if lr is not None and flags.lr_warmup_init > lr:
        raise UserError(
            f"--lr-warmup-init {flags.lr_warmup_init:g}: expected at most {lr_flag} {lr:g}"
        )
    if decay and warmup >= decay:
        raise UserError(
            f"{warmup_flag} ends after {warmup:,g} samples, {decay_flag} after {decay:,g}; "
            "expected a warm-up that ends before the decay does: lower the one or raise the other"
        )
