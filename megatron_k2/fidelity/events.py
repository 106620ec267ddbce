"""Which of two events a sentence puts first, by its words of time, and whether another agrees."""

import re

from megatron_k2.fidelity.sentences import content
from megatron_k2.fidelity.surface import LABEL

_THEN = r"(?:[,;]?\s+and)?\s*[,;]?\s*(?:only then|after that|then|later)\b"
_FORMS = tuple(
    (re.compile(form, re.IGNORECASE | re.DOTALL), earlier)
    for form, earlier in (
        (r"^\W*before\b(.+?),(.+)", 2),
        (r"^\W*(?:only )?(?:after|once)\b(?! that)(.+?)(?:,| does | do | did )(.+)", 1),
        (r"^\W*by the time\b(.+?),(.+)", 2),
        (r"^\W*(?:only )?when\b(.+?\bhad\b.+?)(?:,| does | do | did )(.+)", 1),
        (r"(.+\bfirst\b.*?)[,;](.+)", 1),
        (r"(.+\bfirst\b.*?)\s+and\s+(.+)", 1),
        (r"^(\W*first\b.+?)(?:[,;]|\s+and\s)(.+)", 1),
        (rf"(.+?){_THEN}(.+)", 1),
        (r"(.+)\bbefore\b(.+)", 1),
        (r"(.+)\b(?:after|once)\b(?! that)(.+)", 2),
        (r"(.+)\bwhen\b(.+?\bhad\b.+)", 2),
    )
)
"""Two clauses, and which of them came first; the first form that is there counts. Ours."""
_LEAST = 2
"""Words of content of a clause: *nine days after infection* has no two events; ours."""

_OF_TIME = re.compile(r"\b(?:before|after|once|first|then|later|when|time)\b", re.IGNORECASE)
_LONGEST = 400
"""Characters of a sentence that is looked at: what is longer is a table or a list; ours."""
_RANGE = re.compile(r"\bfrom (\w+) (?:to|until|till|through) (\w+)", re.IGNORECASE)
_BETWEEN = re.compile(r"\bbetween (\w+) and (\w+)", re.IGNORECASE)


def in_order(sentence: str) -> tuple[set[str], set[str]] | None:
    """Content of what came first and of what came then; ``None`` where no word of time says it."""
    plain = LABEL.sub("", sentence)
    if len(plain) > _LONGEST or not _OF_TIME.search(plain):
        return None
    for form, earlier in _FORMS:
        if found := form.search(plain):
            first, then = set(content(found[earlier])), set(content(found[3 - earlier]))
            return (first, then) if min(len(first), len(then)) >= _LEAST else None
    return None


def are_reversed(sentence: str, other: str) -> bool:
    """Whether what one says came first is what the other says came then, or a range runs back."""
    if _run_back(sentence, other) or _run_back(other, sentence):
        return True
    one, two = in_order(sentence), in_order(other)
    if one is None or two is None:
        return False
    straight = len(one[0] & two[0]) + len(one[1] & two[1])
    return len(one[0] & two[1]) + len(one[1] & two[0]) > straight


def _run_back(sentence: str, other: str) -> bool:
    """Whether the other has one of the sentence's ranges with its ends exchanged."""
    here = _RANGE.findall(sentence.lower())
    there = {*_RANGE.findall(other.lower()), *_BETWEEN.findall(other.lower())}
    return any(pair not in there and pair[::-1] in there for pair in here)
