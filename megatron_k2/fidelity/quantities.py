"""Numbers of a text, however they are written: digits, words, separators, percent, millions.

*1,850*, *1 850*, *eighteen hundred and fifty*, *1.85 thousand* are one value; *the third* and *3rd*
are 3. What is counted small and idly ("one of", "two of them") is there, and marked.
"""

import functools
import re
from dataclasses import dataclass
from fractions import Fraction

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen".split()
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_ORDINALS = {
    "first": 1, "second": 2, "third": 3, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7,
    "eighth": 8, "ninth": 9, "tenth": 10, "eleventh": 11, "twelfth": 12, "thirteenth": 13,
    "fourteenth": 14, "fifteenth": 15, "sixteenth": 16, "seventeenth": 17, "eighteenth": 18,
    "nineteenth": 19, "twentieth": 20, "thirtieth": 30, "fortieth": 40, "fiftieth": 50,
    "hundredth": 100,
}  # fmt: skip
_SMALL = (
    {word: value for value, word in enumerate(_ONES)}
    | {word: 10 * place for place, word in enumerate(_TENS, start=2)}
    | {f"{word[:-1]}ies": 10 * place for place, word in enumerate(_TENS, start=2)}
    | {"dozen": 12}
)
_LARGE = {
    "hundred": 100,
    "thousand": 1000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_LARGEST_IDLE = 2
CACHED_TEXTS = 2048
"""Whose numbers are kept: a sentence is compared with each that may have come of it."""
_WORDS = "|".join(sorted([*_SMALL, *_LARGE, *_ORDINALS], key=len, reverse=True))
_SPELLED = rf"\b(?:{_WORDS})s?\b(?:(?:[ -]|,? and )(?:{_WORDS})s?\b)*"
_SPACE = "[\u00a0\u202f\u2009]"
_DIGITS = rf"(?<![\w.])[-−]?\d+(?:(?:,\d{{3}})+|(?:{_SPACE}\d{{3}})+)?(?:\.\d+)*"
_FOUND = re.compile(
    rf"(?P<digits>{_DIGITS})(?:st|nd|rd|th|s)?\b(?:[ -](?P<large>{'|'.join(_LARGE)}))?"
    rf"(?P<percent>\s?%| ?per ?cent)?|(?P<spelled>{_SPELLED})(?P<parts> ?per ?cent)?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Quantity:
    """A number at its place."""

    value: Fraction | str
    """Text for what has two points: a version, a section."""
    start: int
    end: int
    is_idle: bool
    """A small number as a word, which prose adds and drops."""


@functools.lru_cache(maxsize=CACHED_TEXTS)
def quantities(text: str) -> tuple[Quantity, ...]:
    """Numbers in order."""
    found = []
    for match in _FOUND.finditer(text):
        if match["digits"]:
            value = _of_digits(match["digits"], match["large"])
            found.append(Quantity(value, match.start(), match.end(), is_idle=False))
        else:
            for value in _of_words(re.findall(r"[a-z]+", match["spelled"].lower())):
                is_idle = value <= _LARGEST_IDLE and not match["parts"]
                found.append(Quantity(value, match.start(), match.end(), is_idle))
    return tuple(found)


def values(text: str, *, with_idle: bool = True) -> set[Fraction | str]:
    """The distinct values."""
    return {each.value for each in quantities(text) if with_idle or not each.is_idle}


def shown(value: Fraction | str) -> str:
    """A value for a sentence."""
    if isinstance(value, str):
        return value
    return str(value.numerator) if value.denominator == 1 else f"{float(value):g}"


def _of_digits(digits: str, large: str | None) -> Fraction | str:
    plain = re.sub(rf",|{_SPACE}", "", digits).replace("−", "-")
    if plain.count(".") > 1:
        return plain
    return Fraction(plain) * (_LARGE[large.lower()] if large else 1)


def _of_words(spelled: list[str]) -> list[Fraction]:
    """Values of a run of number words; *nineteen eighty-four* is 1984, *one, two* are two."""
    found: list[Fraction] = []
    total = current = 0
    last = ""
    for word in spelled:
        word = word if word in _SMALL or word in _LARGE or word in _ORDINALS else word[:-1]
        if word == "and" or not word or word == "an":
            continue
        if word in _LARGE:
            current, last = max(current, 1) * _LARGE[word], word
            if _LARGE[word] >= 1000:
                total, current = total + current, 0
            continue
        value = _SMALL.get(word, _ORDINALS.get(word, 0))
        if last and not _joins(last, current, value):
            if _is_year(total, current, value):
                current = current * 100 + value
                last = word
                continue
            found.append(Fraction(total + current))
            total = current = 0
        current, last = current + value, word
    if last:
        found.append(Fraction(total + current))
    return found


def _joins(last: str, current: int, value: int) -> bool:
    """Whether a word goes on with the number before it: *twenty* + 3, *hundred* + 23."""
    if last in _LARGE:
        return True
    return current % 100 >= 20 and current % 10 == 0 and 0 < value < 10


def _is_year(total: int, current: int, value: int) -> bool:
    return not total and 11 <= current <= 20 and 10 <= value <= 99
