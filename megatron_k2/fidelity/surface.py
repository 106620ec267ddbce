"""What can be seen of two texts without understanding them: numbers, names, polarity, coverage.

None of it can say that a rewrite is faithful; a number that the source does not have says that it
is not. Each signal comes with its evidence. Measured, a sum of such signals is at chance on
rewrites that change style against near copies that change the meaning, so they gate and advise.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megatron_k2.fidelity.quantities import quantities, shown, values
from megatron_k2.fidelity.sentences import FUNCTION_WORDS, content, folded, sentences, words

LABEL = re.compile(r"^[ \t>*#-]*\**[A-Z][\w .]{0,24}:\**[ \t]", re.MULTILINE)
"""A speaker, or a heading of notes, at the beginning of a line: of the style, not of the text."""
_NEGATIONS = frozenset(
    "not no never none neither nor nobody nothing nowhere cannot without unable hardly scarcely "
    "barely fail fails failed refuse refused refuses deny denied denies lack lacks lacked "
    "forbid forbids forbade forbidden prohibit prohibits prohibited banned".split()
)
_NO_NEGATION = re.compile(
    r"\b(?:no|not|never) (?:only|later than|(?:more|less|fewer) than|over|above|under|below)\b",
    re.IGNORECASE,
)
"""Bounds, and *not only*: they turn nothing round."""
_OPPOSITES = (
    ("before", "after"), ("until", "after"), ("earlier", "later"), ("preceded", "followed"),
    ("more", "less"), ("more", "fewer"), ("most", "least"), ("most", "fewest"),
    ("higher", "lower"), ("highest", "lowest"), ("larger", "smaller"), ("largest", "smallest"),
    ("above", "below"), ("over", "under"), ("maximum", "minimum"), ("longer", "shorter"),
    ("increase", "decrease"), ("increased", "decreased"), ("rise", "fall"), ("rose", "fell"),
    ("raises", "lowers"), ("raised", "lowered"), ("gain", "loss"), ("won", "lost"),
    ("always", "never"), ("all", "none"), ("every", "no"), ("first", "last"), ("with", "without"),
    ("begin", "end"), ("began", "ended"), ("start", "stop"), ("opened", "closed"),
    ("accept", "reject"), ("accepted", "rejected"), ("allow", "forbid"), ("allowed", "forbidden"),
    ("allows", "forbids"), ("north", "south"), ("northern", "southern"), ("east", "west"),
    ("eastern", "western"), ("left", "right"), ("inside", "outside"), ("male", "female"),
    ("day", "night"), ("buy", "sell"), ("bought", "sold"), ("import", "export"),
    ("true", "false"), ("safe", "unsafe"), ("able", "unable"), ("possible", "impossible"),
    ("heavier", "lighter"), ("faster", "slower"), ("warmer", "colder"), ("hot", "cold"),
    ("succeeded", "failed"), ("survived", "died"), ("same", "different"), ("add", "subtract"),
    ("multiply", "divide"), ("up", "down"), ("upper", "lower"), ("dissolves", "precipitates"),
    ("oldest", "youngest"), ("older", "younger"), ("early", "late"), ("major", "minor"),
)  # fmt: skip


class Signal(NamedTuple):
    """One that something is wrong."""

    name: str
    evidence: str
    """What was found, for a person."""


@dataclass(frozen=True)
class Aligned:
    """A sentence of one text beside what is most like it in the other."""

    sentence: str
    other: str
    overlap: float
    """Share of the sentence's content that ``other`` has, 0 to 1."""


@dataclass(frozen=True)
class Surface:
    """A source and its rewrite, compared."""

    source: str
    rewrite: str

    @cached_property
    def forward(self) -> tuple[Aligned, ...]:
        """Each sentence of the rewrite beside the source's."""
        return aligned(self.rewrite, self.source)

    @cached_property
    def reverse(self) -> tuple[Aligned, ...]:
        """Each sentence of the source beside the rewrite's."""
        return aligned(self.source, self.rewrite)

    def gates(self) -> list[Signal]:
        """Signals that alone refuse a rewrite: numbers it has and its source has not."""
        known = values(self.source)
        new = [each for each in quantities(self.rewrite) if not each.is_idle]
        found = dict.fromkeys(shown(each.value) for each in new if each.value not in known)
        return [Signal("number", f"{number} is not in the source") for number in found]

    def advice(self) -> list[Signal]:
        """Signals that do not: where to look, or to ask again."""
        return [
            *self._numbers_left_out(),
            *self._names(self.rewrite, self.source, "new name", "is not in the source"),
            *self._names(self.source, self.rewrite, "name left out", "is not in the rewrite"),
            *self._polarity(),
            *self._coverage(),
        ]

    def _numbers_left_out(self) -> list[Signal]:
        kept = values(self.rewrite)
        gone = [q for q in quantities(self.source) if not q.is_idle and q.value not in kept]
        found = dict.fromkeys(shown(each.value) for each in gone)
        return [Signal("number left out", f"{number} is not in the rewrite") for number in found]

    @staticmethod
    def _names(of: str, other: str, name: str, why: str) -> list[Signal]:
        text = folded(other)
        return [
            Signal(name, f"{each!r} {why}") for each in names(of) if folded(each)[:5] not in text
        ]

    def _polarity(self) -> list[Signal]:
        found = []
        for pair in (*self.forward, *self.reverse):
            if pair.overlap < _ALIKE:
                continue
            if num_negations(pair.sentence) % 2 != num_negations(pair.other) % 2:
                found.append(Signal("negation", f"{pair.sentence.strip()!r:.120}"))
            for a, b in opposites(pair.sentence, pair.other):
                found.append(Signal("opposite", f"{a!r} against {b!r}"))
        return list(dict.fromkeys(found))

    def _coverage(self) -> list[Signal]:
        sides = (("addition", self.forward), ("omission", self.reverse))
        return [
            Signal(name, f"{pair.sentence.strip()!r:.120}: {pair.overlap:.0%} of it is there")
            for name, pairs in sides
            for pair in pairs
            if pair.overlap < _COVERED and len(content(pair.sentence)) >= 3
        ]


_ALIKE = 0.5
"""Overlap from which two sentences are taken to speak of one thing; ours."""
_COVERED = 0.34
"""Overlap under which a sentence has nothing beside it; ours."""


def aligned(text: str, other: str) -> tuple[Aligned, ...]:
    """Each sentence beside the one or two neighbours of the other text that hold most of it."""
    candidates = sentences(other)
    candidates += [a + b for a, b in itertools.pairwise(candidates)]
    contents = [set(_all_content(each)) for each in candidates]
    found = []
    for sentence in sentences(text):
        own = set(_all_content(sentence))
        shares = [_share(own, each) for each in contents]
        best = max(range(len(shares)), key=lambda place: shares[place], default=None)
        if best is None:
            found.append(Aligned(sentence, "", 0.0))
        else:
            found.append(Aligned(sentence, candidates[best], shares[best]))
    return tuple(found)


def _all_content(text: str) -> list[str]:
    return [*content(LABEL.sub("", text)), *(shown(value) for value in values(text))]


def _share(own: set[str], others: set[str]) -> float:
    return len(own & others) / len(own) if own else 1.0


def names(text: str) -> list[str]:
    """Words that are written as names, each once.

    A capital at a sentence's beginning counts where the word is nowhere written small and is no
    word of grammar and, alone, is no speaker's label.
    """
    plain = LABEL.sub("", text)
    small = {folded(word) for word in words(plain) if word[0].islower()}
    found = []
    for sentence in sentences(plain):
        for place, word in enumerate(words(sentence)):
            low = folded(word).removesuffix("'s")
            is_name = word[0].isupper() and len(low) > 1 and low not in FUNCTION_WORDS
            if is_name and low not in small and (place > 0 or _is_rare(word)):
                found.append(word.removesuffix("'s").removesuffix("’s"))
    return list(dict.fromkeys(found))


def _is_rare(word: str) -> bool:
    """Whether a sentence's first word is a name by its form: an acronym, a capital inside."""
    return any(each.isupper() for each in word[1:])


def num_negations(text: str) -> int:
    """Words that turn a sentence round; *n't* among them."""
    found = [folded(word) for word in words(_NO_NEGATION.sub("", text))]
    return sum(word in _NEGATIONS or word.endswith("n't") for word in found)


def opposites(text: str, other: str) -> Sequence[tuple[str, str]]:
    """Pairs of opposite words of which each text has another, and not both."""
    left, right = ({folded(word) for word in words(each)} for each in (text, other))
    found = []
    for pair in _OPPOSITES:
        for a, b in (pair, pair[::-1]):
            if a in left and b not in left and b in right and a not in right:
                found.append((a, b))
    return found


def roles_swapped(text: str, other: str) -> float:
    """Share of neighbouring content words of two like sentences that stand in the other order.

    0: the same order; passive voice and inversion change it too, so it is advice alone.
    """
    left, right = content(text), content(other)
    shared = [word for word in dict.fromkeys(left) if right.count(word) == 1 == left.count(word)]
    places = [right.index(word) for word in shared]
    pairs = list(itertools.pairwise(places))
    return sum(a > b for a, b in pairs) / len(pairs) if pairs else 0.0
