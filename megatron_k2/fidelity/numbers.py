"""What the numbers of a sentence belong to, and which side of them is meant."""

import re
from collections.abc import Mapping

from megatron_k2.fidelity.quantities import quantities, shown
from megatron_k2.fidelity.sentences import content
from megatron_k2.fidelity.surface import LABEL

_CLAUSE = re.compile(r"[,;:]|\b(?:and|or|but|against|while|whereas|another)\b", re.IGNORECASE)
_CLAUSE_COST = 3
"""In words, of going from one clause to the next; ours."""
_UPPER = (
    r"at most|up to|(?:no|not|never) (?:more than|over|above)|under|below|(?:less|fewer) than|"
    r"a maximum of|the maximum is|a limit of|(?:not|never) exceed"
)
_LOWER = (
    r"at least|(?:no|not|never) (?:(?:less|fewer) than|under|below)|more than|over|above|beyond|"
    r"a minimum of|the minimum is|exceed(?:s|ed|ing)?"
)
_BOUND = re.compile(
    rf"(?:(?P<upper>\b(?:{_UPPER}))|\b(?:{_LOWER}))\s+(?:[a-z]+\s+)?$", re.IGNORECASE
)
_BEFORE = 40
"""Characters in front of a number that a bound is looked for in; ours."""


def are_exchanged(sentence: str, other: str) -> float:
    """Share of words of both sentences that stand nearest to another number in each, 0 to 1."""
    left, right = _owners(sentence), _owners(other)
    if len(set(left.values()) & set(right.values())) < 2:
        return 0.0
    both = [word for word in left.keys() & right.keys() if left[word] in right.values()]
    return sum(left[word] != right[word] for word in both) / len(both) if both else 0.0


def have_other_bounds(sentence: str, other: str) -> bool:
    """Whether a number is the least there is in one and the most in the other."""
    left, right = _bounds(sentence), _bounds(other)
    return any(left[value] != right[value] for value in left.keys() & right.keys())


def _owners(sentence: str) -> dict[str, str]:
    """The nearest number to each stem that stands once, where one is nearer than the others."""
    plain = LABEL.sub("", sentence)
    numbers: list[tuple[str, int]] = []
    stems: dict[str, list[int]] = {}
    place = end = 0
    for each in [*(q for q in quantities(plain) if not q.is_idle), None]:
        before = plain[end : each.start if each else len(plain)]
        for piece in re.findall(r"[\w'’-]+|[,;:]", before):
            place += _CLAUSE_COST if _CLAUSE.fullmatch(piece) else 1
            for stem in content(piece):
                stems.setdefault(stem, []).append(place)
        if each:
            place, end = place + 1, each.end
            numbers.append((shown(each.value), place))
    found = {}
    for stem, places in stems.items():
        ranked = sorted((abs(at - places[0]), value) for value, at in numbers)
        if len(places) == 1 and len(ranked) > 1 and ranked[0][0] < ranked[1][0]:
            found[stem] = ranked[0][1]
    return found


def _bounds(sentence: str) -> Mapping[str, bool]:
    """Whether a number is an upper one, where a word of bounds stands before it."""
    found = {}
    for each in quantities(sentence):
        if match := _BOUND.search(sentence[max(each.start - _BEFORE, 0) : each.start]):
            found[shown(each.value)] = match["upper"] is not None
    return found
