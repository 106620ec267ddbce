"""What an iteration's groups look like, as metrics.

Means are over answers, unless said otherwise; a failed answer is in none of them but the failures.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from megatron_k2.records.rollouts import End
from megatron_k2.rl.plan import Iteration
from megatron_k2.rl.record import Group, Trajectory

REPEAT_TOKENS = 8
"""Ours: an answer repeats itself where most of its runs of so many tokens occurred in it before."""


def metrics(iteration: Iteration) -> dict[str, float]:
    """Names to numbers; a mean of nothing is left out.

    ``rl/reward/<set>``, ``rl/verdict/<set>``, ``rl/tokens/<set>``, ``rl/truncated/<set>``,
    ``rl/dead_groups`` (share), ``rl/failed/<end>`` (numbers), ``rl/failed_share``,
    ``rl/repeating``, ``rl/older_tokens`` (share of drawn tokens of versions before the
    iteration's), ``rl/surprise`` (mean of -log p of drawn tokens, nats: the entropy, as far as they
    were drawn at temperature 1), the cut's numbers.
    """
    groups = iteration.groups
    found: dict[str, float] = {
        "rl/groups": len(groups),
        "rl/steps": iteration.facts["num_steps"],
        "rl/cut_off": iteration.facts["num_cut_off"],
        "rl/format_errors": iteration.facts["num_format_errors"],
        "rl/dropped_tokens": iteration.facts["num_dropped_tokens"],
        **{f"rl/temperature/{n}": t for n, t in iteration.facts["temperatures"].items()},
        **{f"rl/left_out/{n}": number for n, number in iteration.facts["num_left_out"].items()},
    }
    for name in sorted({group.task_set for group in groups}):
        found |= _of_set(name, [group for group in groups if group.task_set == name])
    answers = [each for group in groups for each in group.trajectories]
    failed = Counter(each.end for each in answers if each.reward is None)
    found |= {f"rl/failed/{end.value}": number for end, number in sorted(failed.items())}
    found |= _mean("rl/failed_share", (each.reward is None for each in answers))
    known = [each for each in answers if each.reward is not None]
    found |= _mean("rl/dead_groups", (not group.is_live for group in groups))
    found |= _mean("rl/repeating", (repeats(drawn_ids(each)) for each in known))
    return found | _of_tokens(known, iteration.version)


def _of_set(name: str, groups: Sequence[Group]) -> dict[str, float]:
    known = [each for group in groups for each in group.judged]
    return {
        **_mean(f"rl/reward/{name}", (each.reward or 0.0 for each in known)),
        **_mean(f"rl/verdict/{name}", (each.parts["verdict"] for each in known)),
        **_mean(f"rl/tokens/{name}", (each.num_sampled for each in known)),
        **_mean(f"rl/truncated/{name}", (each.end is End.TOKENS for each in known)),
    }


def _of_tokens(answers: Sequence[Trajectory], version: int) -> dict[str, float]:
    drawn = [each for answer in answers for each in answer.segments if each.is_sampled]
    logprobs = [value for each in drawn for value in each.logprobs]
    older = (each.weight_version < version for each in drawn for _ in each.token_ids)
    return {
        **_mean("rl/surprise", (-value for value in logprobs)),
        **_mean("rl/older_tokens", older),
    }


def _mean(name: str, values: Iterable[float]) -> dict[str, float]:
    found = list(values)
    return {name: sum(found) / len(found)} if found else {}


def drawn_ids(answer: Trajectory) -> tuple[int, ...]:
    """Ids that the policy drew."""
    return tuple(i for each in answer.segments if each.is_sampled for i in each.token_ids)


def repeats(ids: Sequence[int]) -> bool:
    """Whether most runs of ``REPEAT_TOKENS`` tokens occurred before."""
    runs = [tuple(ids[n : n + REPEAT_TOKENS]) for n in range(len(ids) - REPEAT_TOKENS + 1)]
    return len(set(runs)) < len(runs) / 2
