"""How a run learns, as its flags say. No torch: the command line reads this."""

from argparse import Namespace
from dataclasses import dataclass
from typing import Literal

from megatron_k2.errors import UserError

Form = Literal["sequence", "token", "window"]
LengthScale = Literal["sum", "per_token"]
"""An answer's term as it is, which is the report's, or by its length."""


@dataclass(frozen=True)
class Objective:
    """Which loss, with which constants; see ``objective.py``."""

    form: Form = "sequence"
    """The report's, ROLL's by tokens, or K2.5's."""
    tau: float = 0.1
    """Not stated for K2; ROLL's."""
    length_scale: LengthScale = "sum"
    ratio_cap: float = 2.0
    """Of the token form's importance ratio."""
    window: tuple[float, float] = (-0.5, 0.5)
    """Of the window form, in log-ratios; K2.5's numbers are not published."""
    ptx_weight: float = 0.0
    """lambda_ptx, of nats per token."""
    lesson_weight: float = 0.1
    """Of the critic's lessons, in nats per letter. How the report weighs them is not stated."""

    @property
    def keeps_old(self) -> bool:
        """Whether tokens that older versions drew are trained on."""
        return self.form != "sequence"


@dataclass(frozen=True)
class LearnerSettings:
    """Of the trainer's side."""

    objective: Objective = Objective()
    mini_batches: int = 1
    """Optimizer steps an iteration; groups of one prompt stay together."""
    ptx_packs: int = 0
    """Of curated data, a step."""
    resets_optimizer: bool = False
    """Momenta begin anew each iteration. K1.5 resets, K2 does not say; off."""
    replays_routes: bool = True
    """Experts as the engine chose them, where it recorded them."""
    shares_prompts: bool = True
    """Answers of a pack share their prompt's rows, where the model can."""


def settings_from(args: Namespace) -> LearnerSettings:
    """Of parsed arguments, ``flags.add_rl_arguments``.

    Raises:
        UserError: a number outside its range.
    """
    _check(args)
    objective = Objective(
        form=args.policy_loss,
        tau=args.policy_tau,
        length_scale=args.policy_length_scale.replace("-", "_"),
        ratio_cap=args.policy_ratio_cap,
        window=tuple(args.policy_window),
        ptx_weight=args.ptx_weight,
        lesson_weight=args.critic_weight,
    )
    return LearnerSettings(
        objective=objective,
        mini_batches=args.mini_batches,
        ptx_packs=args.ptx_packs if args.sft_data is not None else 0,
        resets_optimizer=args.reset_optimizer,
        replays_routes=not args.no_router_replay,
        shares_prompts=not args.no_shared_prompts,
    )


def _check(args: Namespace) -> None:
    low, high = args.policy_window
    checks = (
        ("--policy-tau", args.policy_tau > 0, "more than 0"),
        ("--policy-ratio-cap", args.policy_ratio_cap > 0, "more than 0"),
        ("--policy-window", low < 0 < high, "a log-ratio on either side of 0"),
        ("--ptx-weight", args.ptx_weight >= 0, "0 or more"),
        ("--critic-weight", args.critic_weight > 0, "more than 0"),
        ("--mini-batches", args.mini_batches >= 1, "1 or more"),
        ("--ptx-packs", args.ptx_packs >= 1, "1 or more"),
    )
    for flag, is_right, expected in checks:
        if not is_right:
            value = getattr(args, flag.removeprefix("--").replace("-", "_"))
            raise UserError(f"{flag} {value}: expected {expected}")
