"""What a run of reinforcement learning refuses before anything expensive."""

from pathlib import Path

from megatron_k2.errors import UserError
from megatron_k2.flags.words import last_value
from megatron_k2.rl.flags import FUSED_ROUTER
from megatron_k2.rl.rails import rails_from
from megatron_k2.rl.task_sets import read_task_sets
from megatron_k2.run.flags import RunFlags
from megatron_k2.training.preflight import check_run

_REFUSED = {
    "--overlap-param-gather": "weights are read between steps, for pi_old and for the engine",
    "--overlap-moe-expert-parallel-comm": "its schedule takes no log-probabilities for a loss",
    "--async-save": "what was consumed is committed with the checkpoint, so that must be whole",
    "--perform-rl-step": "Megatron's own, of a package that its wheel lacks",
}
"""Flags of Megatron's that do not go with it -> why."""


def check_rl(flags: RunFlags, world_size: int) -> None:
    """Refuse what cannot run.

    Args:
        flags: of the run, expanded.
        world_size: ranks that will be started.

    Raises:
        UserError: naming the value, what was expected, and the way out.
    """
    _check_answers(flags, world_size)
    check_run(flags, world_size)
    for flag, reason in _REFUSED.items():
        if flag in flags:
            raise UserError(f"{flag} with reinforcement learning: {reason}; drop it")
    if flags.micro_batch_size != 1:
        raise UserError(
            f"--micro-batch-size {flags.micro_batch_size}: a pack fills its row; take 1, and a "
            "longer --seq-length for more tokens at once"
        )
    kinds = [kind for kind in flags.moe_router_load_balancing_type if kind != "none"]
    if kinds and any(flags.moe_aux_loss_coeff):
        raise UserError(
            f"--moe-router-load-balancing-type {' '.join(kinds)} with packed answers is a mean "
            "over whoever shares a row; take none"
        )
    if "--calculate-per-token-loss" not in flags:
        raise UserError(
            "missing --calculate-per-token-loss: micro-batches must add up; give it, or --preset"
        )
    _check_fused_router(flags)
    _check_ptx(flags)


def check_whole(flags: RunFlags, world_size: int) -> None:
    """Refuse what would be found out when the model is built: files, rails, sets, engines.

    Args:
        flags: of the run, expanded.
        world_size: ranks that will be started.

    Raises:
        UserError: as ``check_rl``.
    """
    check_sampling(flags)
    places = [n for n, word in enumerate(flags.words) if word == "--rail"]
    rails_from([flags.words[n + 1] for n in places if n + 1 < len(flags.words)])
    check_rl(flags, world_size)


def check_sampling(flags: RunFlags) -> None:
    """Refuse files that sampling cannot be had with; what the controller reads too.

    Args:
        flags: of the run, expanded.

    Raises:
        UserError: naming the flag.
    """
    is_synthetic = "--synthetic-data" in flags
    for flag, what in (
        ("--save", "the ledger of what was sampled lies in it"),
        ("--tasks", "a file of task sets (docs/rl.md)"),
        ("--chat-tokenizer", "the tokenizer that the model was fine-tuned with"),
    ):
        if (value := last_value(flags.words, flag)) is None:
            raise UserError(f"missing {flag}: {what}")
        if flag != "--save" and not is_synthetic and not Path(value).exists():
            raise UserError(f"{flag} {value} does not exist; expected {what}")
    tasks = Path(last_value(flags.words, "--tasks") or "")
    if tasks.exists():  # or is made (``synthetic.py``)
        read_task_sets(tasks)


def _check_answers(flags: RunFlags, world_size: int) -> None:
    """Packs are dealt out unevenly, but Megatron's global batch, which counts answers, is not."""
    answers, ranks = flags.global_batch_size or 0, flags.layout(world_size).data_parallel
    if ranks and answers % ranks:
        raise UserError(
            f"{answers} answers a step (--prompts-per-iteration x --group-size / --mini-batches): "
            f"expected a multiple of the {ranks} data-parallel ranks"
        )


def _check_fused_router(flags: RunFlags) -> None:
    if FUSED_ROUTER in flags and "--no-router-replay" not in flags:
        raise UserError(
            f"{FUSED_ROUTER}: the fused router takes no choice from outside, and replay is on; "
            "drop it, or add --no-router-replay"
        )


def _check_ptx(flags: RunFlags) -> None:
    weight = float(last_value(flags.words, "--ptx-weight") or 0)
    if weight and not flags.sft_data:
        raise UserError(
            f"--ptx-weight {weight:g} without --ptx-data; name a set of 'megatron-k2 data chat'"
        )
    if flags.sft_data and not weight:
        raise UserError("--ptx-data without --ptx-weight: it would be read and not learnt from")
