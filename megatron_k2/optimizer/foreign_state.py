"""Optimizer state in a checkpoint that this run did not write: told apart early, and taken over.

Three kinds load here: ours over ZeRO (``chain.FORMAT``), ours without, and that of Megatron's own
``--optimizer muon``. The last differs in what its momentum is,

    Megatron (Emerging-Optimizers):  m <- μ m + (1 - μ) G,    orthogonalised: μ m + (1 - μ) G
    here (Moonlight, section 2.2):   M <- μ M + G,            orthogonalised: μ M + G

so that M = m / (1 - μ): the same directions from there on, to the rounding of that one division. To
take m for M would weigh the past 1 - μ, a twentieth, of what it should. Parameter groups are ours:
Megatron exempts norms from weight decay and has more of them.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import load_common_state_dict

from megatron_k2.errors import UserError
from megatron_k2.run.iterations import is_whole, iteration_directory, tracker_text

WAY_OUT = "load the weights alone with --no-load-optim, or --finetune"


def inner(state: dict[str, Any]) -> dict[str, Any]:
    """Torch's part of one Megatron optimizer's state (bf16 parameters wrap it once more)."""
    wrapped: dict[str, Any] = state.get("optimizer", state)
    return wrapped


def parts(state: Any) -> list[dict[str, Any]]:
    """The state of each optimizer of a chain, as ``ChainedOptimizer`` saves it.

    Raises:
        UserError: if it is no such state.
    """
    is_chain = isinstance(state, dict) and all(isinstance(key, int) for key in state)
    found = [state[key] for key in sorted(state)] if is_chain else [state]
    if not all(isinstance(part, dict) and "param_groups" in inner(part) for part in found):
        raise UserError(f"the checkpoint's optimizer state is of no kind known here; {WAY_OUT}")
    return found


def upstream_momentum(state: Any) -> float | None:
    """μ with which Megatron's ``muon`` wrote ``state``; ``None`` if it is our own.

    Raises:
        UserError: where its momentum cannot be taken over.
    """
    groups = [group for part in parts(state) for group in inner(part)["param_groups"]]
    muons = [group for group in groups if "momentum" in group]
    if not muons:
        return None
    if any("beta2" in group for group in muons):
        raise UserError(f"the checkpoint was written by adaptive_muon, not muon; {WAY_OUT}")
    mus = {float(group["momentum"]) for group in muons}
    if len(mus) != 1 or not 0 <= min(mus) < 1:
        raise UserError(
            f"the checkpoint's muon has momentum {sorted(mus)}, expected one number in [0, 1); "
            f"{WAY_OUT}"
        )
    if not any("betas" in group for group in groups):
        raise UserError(f"the checkpoint has no AdamW state beside its muon's; {WAY_OUT}")
    return mus.pop()


def adopt_groups(state: Any, own_groups: list[list[dict[str, Any]]]) -> None:
    """Make our own loaded groups this run's: their parameters' numbers, their rates.

    A checkpoint keeps no numbers. Of a group it has the schedule of the run that wrote it, by which
    Megatron would look for the group; a resume sets the same again, a next phase has another.

    Raises:
        UserError: if the checkpoint has other groups.
    """
    found = [inner(part)["param_groups"] for part in parts(state)]
    if [len(groups) for groups in found] != [len(groups) for groups in own_groups]:
        raise UserError(
            f"the checkpoint has {[len(groups) for groups in found]} parameter groups in each "
            f"optimizer, this run {[len(groups) for groups in own_groups]}; {WAY_OUT}"
        )
    for groups, own in zip(found, own_groups, strict=True):
        for group, own_group in zip(groups, own, strict=True):
            group.update({key: own_group[key] for key in own_group if key != "step"})


def take_over(state: Any, mu: float, own_groups: list[list[dict[str, Any]]]) -> None:
    """Turn a loaded state of Megatron's ``muon`` into ours, in place.

    Args:
        state: as loaded: tensors in the numbering of our parameters, the rest from the file.
        mu: ``upstream_momentum``.
        own_groups: parameter groups of each of our optimizers' own ``state_dict``.
    """
    found = [inner(part) for part in parts(state)]
    steps = [part["state"].pop("common_step") for part in found if "common_step" in part["state"]]
    saved = [group for part in found for group in part["param_groups"] if "betas" in group]
    for part, groups in zip(found, own_groups, strict=True):
        for values in part["state"].values():
            if "momentum_buffer" in values:
                values["momentum_buffer"] = values["momentum_buffer"] / (1 - mu)
        is_adamw = any("betas" in group for group in groups)
        if is_adamw and steps:
            part["state"]["common_step"] = steps[0]
        for group in groups:
            if is_adamw and "step" in saved[0]:  # Transformer Engine's FusedAdam
                group["step"] = saved[0]["step"]
        part["param_groups"] = groups


def check_optimizer_state(args: Namespace, zero_format: str, load: str | None) -> None:
    """Refuse a checkpoint whose optimizer state this run could not continue, before it is read.

    Args:
        args: Megatron's.
        zero_format: what MuonClip over ZeRO writes as its format.
        load: the run whose state it will be.

    Raises:
        UserError: naming what was found and the way out.
    """
    if load is None or args.no_load_optim or args.finetune:
        return
    step = str(args.ckpt_step or tracker_text(Path(load)) or "")
    directory = iteration_directory(Path(load), int(step)) if step.isdigit() else None
    if directory is None or not is_whole(directory):
        return
    state = load_common_state_dict(str(directory)).get("optimizer")
    if state is None:
        return
    found = state.get("format") if isinstance(state, dict) else None
    if args.use_distributed_optimizer and found != zero_format:
        raise UserError(
            f"{directory}: the optimizer state was not written by MuonClip with "
            "--use-distributed-optimizer; continue without that flag (Megatron's muon loads "
            f"there too), or {WAY_OUT}"
        )
    if not args.use_distributed_optimizer:
        if found is not None:
            raise UserError(
                f"{directory}: the optimizer state was written by MuonClip with "
                f"--use-distributed-optimizer; add that flag, or {WAY_OUT}"
            )
        upstream_momentum(state)
