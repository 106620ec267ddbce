"""Who does it to whom, as far as prepositions and the order of mention tell.

Passive voice and converse verbs (*sold*, *bought from*) change the order of mention and say the
same, so a word behind *by* or *from* counts as the doer wherever it stands; without one, whoever is
mentioned first does. Advice alone: *rises from* is no deed.
"""

import itertools
import re
from collections.abc import Mapping
from typing import NamedTuple

from megatron_k2.fidelity.sentences import FUNCTION_WORDS, content, folded
from megatron_k2.fidelity.surface import LABEL, names

_BEFORE_DOER = frozenset({"by", "from"})
"""Ours; *to* and *for* were tried too, and say something else as often."""
_IN_PHRASE = frozenset("a an the his her its their this that each every".split())
"""Words of grammar that do not end a noun phrase."""
_PHRASE = 4
"""Longest noun phrase, in words; ours. A comma begins another, of the same person."""
_WORD = re.compile(r"[\w'’-]+|[,;:.]")


class _Place(NamedTuple):
    number: int
    is_behind: bool
    """Behind a preposition of the doer."""


def are_exchanged(sentence: str, other: str) -> float:
    """Share of pairs of words of both sentences of which each has another as the doer, 0 to 1.

    Pairs of names where both sentences have some, else of words; in one of the sentences at least a
    preposition has to tell.
    """
    left, right = _places(sentence), _places(other)
    both = left.keys() & right.keys()
    called = both & {stem for name in names(sentence) for stem in content(name)}
    told = [
        _is_first(left, a, b) != _is_first(right, a, b)
        for a, b in itertools.combinations(sorted(called if len(called) > 1 else both), 2)
        if any(places[a].is_behind != places[b].is_behind for places in (left, right))
    ]
    return sum(told) / len(told) if told else 0.0


def _places(sentence: str) -> dict[str, _Place]:
    """Stems of content that stand once."""
    found: dict[str, list[_Place]] = {}
    is_behind, left = False, 0
    for number, word in enumerate(_WORD.findall(LABEL.sub("", sentence))):
        low = folded(word)
        left = _PHRASE if low == "," or low in _BEFORE_DOER else left - 1
        if low in _BEFORE_DOER:
            is_behind = True
        elif low in ";:." or (low in FUNCTION_WORDS and low not in _IN_PHRASE):
            is_behind = False
        for stem in content(word):
            found.setdefault(stem, []).append(_Place(number, is_behind and left >= 0))
    return {stem: places[0] for stem, places in found.items() if len(places) == 1}


def _is_first(places: Mapping[str, _Place], a: str, b: str) -> bool:
    """Whether ``a`` does it to ``b``."""
    if places[a].is_behind != places[b].is_behind:
        return places[a].is_behind
    return places[a].number < places[b].number
