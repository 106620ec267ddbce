"""Answers to one prompt in one pack, which then reads the prompt once.

A group goes whole into the fullest pack that still holds it. Where none does, it is divided: into
the emptiest one, if that has room for more of the answers' own rows than of the prompt, which is
read again there, and into new ones. So packs are as full as answers allow, and a prompt is read as
often as packs have answers to it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from megatron_k2.rl.record import Trajectory


@dataclass(frozen=True)
class Answer:
    """A trajectory that is learnt from."""

    trajectory: Trajectory
    advantage: float
    weight: float
    """Among all answers of the step; of ``objective.Advantages``."""
    num_trained: int
    """Tokens in its mask."""


@dataclass(frozen=True)
class Bundle:
    """Answers that go on from rows that they share; one alone shares none."""

    answers: tuple[Answer, ...]
    num_shared: int = 0
    """Rows of their common beginning, once before all of them."""

    @property
    def num_rows(self) -> int:
        """Of all of them together."""
        own = (len(each.trajectory.token_ids) - 1 - self.num_shared for each in self.answers)
        return self.num_shared + sum(own)


def bundled(answers: Sequence[Answer], num_rows: int) -> list[tuple[Bundle, ...]]:
    """Packs of answers, those with one beginning together.

    Args:
        answers: of which each fits a pack.
        num_rows: s of a pack.
    """
    alike: dict[object, list[Answer]] = {}
    for number, answer in enumerate(answers):
        alike.setdefault(_beginning(answer.trajectory) or number, []).append(answer)
    groups = [_bundle(sorted(each, key=_length, reverse=True)) for each in alike.values()]
    packs: list[_Open] = []
    for group in sorted(groups, key=lambda each: -each.num_rows):
        rest: Bundle | None = group
        while rest is not None:
            rest = _put(rest, packs, num_rows)
    return [tuple(map(_plain, each.bundles)) for each in packs]


@dataclass
class _Open:
    """A pack that may take more."""

    free: int
    bundles: list[Bundle] = field(default_factory=list)

    def take(self, bundle: Bundle) -> None:
        self.bundles.append(bundle)
        self.free -= bundle.num_rows


def _put(bundle: Bundle, packs: list[_Open], num_rows: int) -> Bundle | None:
    """All of a bundle into a pack, or what fits; what is left."""
    fitting = [each for each in packs if each.free >= bundle.num_rows]
    if fitting:
        min(fitting, key=lambda each: each.free).take(bundle)
        return None
    place = max(packs, key=lambda each: each.free, default=None)
    first, rest = _divided(bundle, place.free) if place is not None else (None, bundle)
    if place is None or first is None or first.num_rows < 2 * first.num_shared:
        place = _Open(num_rows)
        packs.append(place)
        first, rest = _divided(bundle, num_rows)
    assert first is not None  # each answer fits a pack
    place.take(first)
    return rest


def _divided(bundle: Bundle, free: int) -> tuple[Bundle | None, Bundle | None]:
    """As many answers as so many rows hold, the longest first, and the others."""
    taken: list[Answer] = []
    left: list[Answer] = []
    free -= bundle.num_shared
    for answer in bundle.answers:
        own = _length(answer) - 1 - bundle.num_shared
        (taken if own <= free else left).append(answer)
        free -= own if own <= free else 0
    first, rest = (replace(bundle, answers=tuple(each)) for each in (taken, left))
    return first if taken else None, rest if left else None


def _bundle(answers: Sequence[Answer]) -> Bundle:
    """Of answers with one beginning: all its rows but that of its last token are shared."""
    given = _beginning(answers[0].trajectory)
    return Bundle(tuple(answers), max(sum(len(tokens) for tokens, _ in given) - 1, 0))


def _plain(bundle: Bundle) -> Bundle:
    """One answer alone shares nothing."""
    return replace(bundle, num_shared=0) if len(bundle.answers) == 1 else bundle


def _length(answer: Answer) -> int:
    return len(answer.trajectory.token_ids)


_Beginning = tuple[tuple[tuple[int, ...], object], ...]


def _beginning(trajectory: Trajectory) -> _Beginning:
    """What was read before the first token was drawn, and where it was routed.

    Answers that have both in common share rows. One whose prompt an engine read anew, by later
    weights, may have been routed otherwise, and keeps its own.
    """
    given = itertools.takewhile(lambda segment: not segment.is_sampled, trajectory.segments)
    return tuple((segment.token_ids, segment.routes) for segment in given)
