"""Reinforcement learning's command line as Megatron's flags: what it counts, its defaults.

A preset's flags come first, these after them, what the user typed last; the last one wins. Megatron
has flags that begin with ``--rl-`` and ``--grpo-``, of a package that its wheel lacks: none of ours
does. Its *iteration* is one mini-batch here; ``--iterations`` counts rounds of sampling.
"""

import argparse
from collections.abc import Sequence
from typing import get_args

from megatron_k2.errors import UserError
from megatron_k2.flags.megatron import SFT_DATA, add_k2_arguments
from megatron_k2.flags.megatron import expand as expand_pretraining
from megatron_k2.flags.schedule import FRACTION
from megatron_k2.flags.words import last_value, take
from megatron_k2.rl.settings import Form, Objective

PTX_DATA = "--ptx-data"
FUSED_ROUTER = "--moe-router-fusion"
"""Transformer Engine's, which takes no choice of experts from outside."""
ITERATIONS, PROMPTS, GROUP_SIZE = 100, 32, 8
"""Choices; K2's are not published. OpenKimi takes 512 prompts of 16 answers, slime 128 of 8."""
WARMUP_STEPS = 10
LR = 1e-6
"""Not stated for K2; slime's and Miles's recipes for it have it. 2e-4 is for toy models only."""

DEFAULTS = (
    f"--micro-batch-size 1 --lr {LR:g} --min-lr {LR:g} --lr-decay-style constant --eval-iters 0 "
    "--moe-router-load-balancing-type none --moe-aux-loss-coeff 0 --moe-router-bias-update-rate 0 "
    "--on-spike off --tokenizer-type NullTokenizer"
).split()
"""Neither balance loss nor a moving router bias: what was sampled was routed by the bias as it is.
A loss of RL has no level that could spike."""


def add_rl_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Megatron's ``extra_args_provider``: this package's flags and those of the trainer's side."""
    group = add_k2_arguments(parser).add_argument_group("megatron_k2 rl")
    group.add_argument("--iterations", type=int, default=ITERATIONS, help="rounds of sampling")
    group.add_argument(
        "--prompts-per-iteration", type=int, default=PROMPTS, help="groups of an iteration"
    )
    group.add_argument("--group-size", type=int, default=GROUP_SIZE, help="answers to a prompt")
    group.add_argument(
        "--mini-batches", type=int, default=1, help="optimizer steps an iteration (default 1)"
    )
    _add_objective(group)
    _add_sampling(group)
    _add_cluster(group)
    _add_watching(group)
    group.add_argument(
        "--ptx-packs", type=int, default=1, help=f"packs of {PTX_DATA} in each step (default 1)"
    )
    group.add_argument(
        "--reset-optimizer",
        action="store_true",
        help="begin each iteration with an empty optimizer state (K1.5; not stated for K2)",
    )
    group.add_argument(
        "--no-router-replay",
        action="store_true",
        help="let the trainer's routers choose, although the engine recorded where tokens went",
    )
    group.add_argument(
        "--no-shared-prompts",
        action="store_true",
        help="compute a prompt for each of its answers, not once for those of a pack",
    )
    return parser


def _add_objective(group: argparse._ArgumentGroup) -> None:
    default = Objective()
    group.add_argument(
        "--policy-loss",
        choices=get_args(Form),
        default=default.form,
        help="the report's squared residual of whole answers, or by tokens (ROLL), or with K2.5's "
        "window",
    )
    group.add_argument(
        "--policy-tau", type=float, default=default.tau, help="regularisation (not stated for K2)"
    )
    group.add_argument(
        "--policy-length-scale",
        choices=["sum", "per-token"],
        default="sum",
        help="an answer's term as it is, or by its length",
    )
    group.add_argument(
        "--policy-ratio-cap",
        type=float,
        default=default.ratio_cap,
        help="of the token form's importance ratio to the version that sampled",
    )
    group.add_argument(
        "--policy-window",
        type=float,
        nargs=2,
        default=list(default.window),
        metavar=("LOW", "HIGH"),
        help="of the window form, in log-ratios",
    )
    group.add_argument(
        "--ptx-weight",
        type=float,
        default=default.ptx_weight,
        help=f"of the NLL per token of {PTX_DATA}; independent of tau (default 0)",
    )


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--tasks", metavar="FILE.json", help="task sets to train on (rl/task_sets.py)")
    add("--chat-tokenizer", metavar="DIR", help="of K2's chat format")
    add("--groups-in-play", type=int, metavar="M", help="prompts at once (default 1.5 x prompts)")
    add("--engine-slots", type=int, metavar="S", help="answers decoded at once (default: all, 64)")
    add(
        "--engine-processes",
        type=int,
        default=1,
        metavar="N",
        help="on a CPU, to share the slots out; other ranks' cores are idle meanwhile (default 1)",
    )
    add("--max-decode-steps", type=int, metavar="N", help="that end an iteration before its groups")
    add("--batch-invariant", action="store_true", help="the same bits whatever else is sampled")
    add("--sandbox", help="back-end for programs; default: the strongest")
    add("--critic", metavar="FILE.json", help="calibration of the critic, for rubric rewards")
    add("--force-critic", action="store_true", help="take a critic that is below its bar")
    add(
        "--critic-refresh-every",
        type=int,
        default=0,
        metavar="N",
        help="iterations between lessons in judging, made of verified answers (0: none)",
    )
    add(
        "--critic-weight",
        type=float,
        default=Objective().lesson_weight,
        help="of the lessons' NLL per letter (default 0.1)",
    )


def _add_cluster(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--meet", metavar="DIR", help="where this start's engines and controller meet (docs/rl.md)")
    add("--engines", metavar="FILE.json", help="of the run, with --meet (docs/rl.md)")
    add(
        "--offload-in-rollout",
        action="store_true",
        help="while answers are sampled: weights and optimizer state in host memory, no gradients",
    )
    add("--gym", type=int, default=0, metavar="N", help="services to wait for, with --meet")
    add("--host", help="that the controller listens on (default: the address of its node's name)")


def _add_watching(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--eval-every", type=int, default=10, help="iterations between held-out tries (0: none)")
    add("--eval-samples", type=int, default=1, help="of each held-out task at temperature 1")
    add("--rail", action="append", default=[], metavar="NAME=BOUND", help="see docs/rl.md; or off")
    add("--on-alarm", choices=["stop", "warn", "off"], default="stop", help="(default: stop)")


def expand(argv: list[str], *, cuda: bool) -> list[str]:
    """The plain flag list of a run.

    Args:
        argv: what the user typed; ``--ptx-data`` names packed sets as ``sft --data`` does.
        cuda: whether this machine has CUDA.

    Raises:
        UserError: counts that do not divide, or what ``flags.megatron.expand`` refuses.
    """
    typed = _in_mini_batches([_renamed(word) for word in argv])
    flags = [*DEFAULTS, *_start(typed), *_schedule(typed)]
    if "--optimizer-cpu-offload" not in typed:  # which would have to read states back
        flags.append("--log-muon-steps")
    expanded = expand_pretraining([*flags, *typed], cuda=cuda)
    if FUSED_ROUTER in typed or "--no-router-replay" in typed:
        return expanded
    return [word for word in expanded if word != FUSED_ROUTER]  # a machine's default, not asked for


def _renamed(word: str) -> str:
    name, is_given, value = word.partition("=")
    return f"{SFT_DATA}{is_given}{value}" if name == PTX_DATA else word


def _in_mini_batches(typed: Sequence[str]) -> list[str]:
    """What was counted in iterations of sampling as Megatron counts: in optimizer steps.

    Flags with ``--train-iters`` are, for this is what wrote them: a script of all flags
    (``launch --print-args``) is expanded once more where it is run.
    """
    mini_batches, words = _count(typed, "--mini-batches", 1), list(typed)
    if last_value(typed, "--train-iters") is not None:
        return words
    for name in ("--save-interval", "--save-retain-interval", "--exit-interval"):
        if last_value(words, name) is not None:
            number = _count(words, name, 1) * mini_batches
            words = [*take(words, name)[1], name, str(number)]
    return words


def _start(typed: Sequence[str]) -> list[str]:
    """Weights alone of what ``--load`` names, another run: steps and momentum begin anew."""
    load = last_value(typed, "--load")
    is_given = load not in (None, last_value(typed, "--save")) and "--finetune" not in typed
    return ["--finetune"] if is_given else []


def _schedule(typed: Sequence[str]) -> list[str]:
    """Steps of the run, answers a step, a short warm-up."""
    iterations = _count(typed, "--iterations", ITERATIONS)
    mini_batches = _count(typed, "--mini-batches", 1)
    prompts = _count(typed, "--prompts-per-iteration", PROMPTS)
    if prompts % mini_batches:
        raise UserError(
            f"--prompts-per-iteration {prompts} does not divide by --mini-batches {mini_batches}; "
            "groups of one prompt stay in one step"
        )
    answers = prompts * _count(typed, "--group-size", GROUP_SIZE) // mini_batches
    steps = iterations * mini_batches
    flags = ["--global-batch-size", str(answers), "--train-iters", str(steps)]
    flags += ["--lr-decay-iters", str(steps)]
    if last_value(typed, FRACTION) is None:
        flags += ["--lr-warmup-iters", str(min(WARMUP_STEPS, steps // 10))]
    return flags


def _count(typed: Sequence[str], name: str, default: int) -> int:
    text = last_value(typed, name)
    if text is None:
        return default
    if not text.isdecimal() or not int(text):
        raise UserError(f"{name} {text}: expected a whole number above 0")
    return int(text)
