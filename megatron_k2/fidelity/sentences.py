"""A text cut into sentences that add up to it, and the words that carry its content.

Rules, no model: an end mark followed by space and a beginning, a line break before a list's item or
a heading, a blank line. A fenced block is one piece. Concatenated, the pieces are the text, so that
whoever rewrites piece by piece can say what became of each.
"""

import functools
import re
import unicodedata
from collections.abc import Iterator

CACHED_WORDS = 1 << 16
"""Whose stems are kept; a text says most of its words again."""
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st jr sr vs etc e.g i.e cf al fig figs no nos vol pp p ed eds approx ca "
    "dept gen col lt sgt rev hon gov sen rep inc ltd co corp ave blvd mt jan feb mar apr jun jul "
    "aug sep sept oct nov dec u.s u.k a.m p.m ph.d".split()
)
_FENCE = re.compile(r"^(`{3,}|~{3,})[^\n]*\n.*?(?:^\1[^\n]*(?:\n|\Z)|\Z)", re.MULTILINE | re.DOTALL)
_END = re.compile(
    r"(?P<wide>[。！？]+[」』”’）]*\s*)"
    r"|(?P<mark>[.!?…]+)[\"'”’)\]]*(?P<space>\s+)(?=[\"'“‘(\[]*[A-Z0-9\u00c0-\u024f\u0370-\u052f])"
    r"|\n[ \t]*\n\s*"
    r"|\n(?=[ \t]*(?:[-*+•#>|]|\d{1,3}[.)])[ \t])"
    r"|\n(?=\w[\w ]{0,24}:\s)"
)
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
FUNCTION_WORDS = frozenset(
    "a about above after again all also although am among an and another any are as at be because "
    "been before being below between both but by can could did do does done down during each else "
    "even ever every few for from further had has have having he her here hers him his how however "
    "i if in indeed into is it its itself just less like may me might mine more most much must my "
    "next no nor not now of off on once one only or other our ours out over own per rather same "
    "she should since so some still such than that the their theirs them then there therefore "
    "these they this those though through thus to too toward under until up upon us very was we "
    "well were what when where whether which while who whom whose why will with within without "
    "would yes yet you your yours".split()
)
"""English words of grammar, which two texts share whatever they say."""


def sentences(text: str) -> list[str]:
    """Pieces of a text, each with the space behind it; joined, they are the text."""
    found, begin = [], 0
    for end in _ends(text):
        if text[begin:end].strip():
            found.append(text[begin:end])
            begin = end
    if begin < len(text):
        rest = text[begin:]
        if rest.strip() or not found:
            found.append(rest)
        else:
            found[-1] += rest
    return found


def _ends(text: str) -> Iterator[int]:
    """Places at which a piece may end, rising."""
    begin = 0
    for fence in _FENCE.finditer(text):
        yield from _ends_of_prose(text, begin, fence.start())
        yield fence.start()
        yield fence.end()
        begin = fence.end()
    yield from _ends_of_prose(text, begin, len(text))


def _ends_of_prose(text: str, begin: int, end: int) -> Iterator[int]:
    for match in _END.finditer(text, begin, end):
        if match["mark"] == "." and _is_abbreviation(text[begin : match.start("mark")]):
            continue
        yield match.end()


def _is_abbreviation(before: str) -> bool:
    word = before.rsplit(maxsplit=1)[-1].lstrip("\"'“‘([") if before.strip() else ""
    # A single letter is an initial; "I." ends a sentence about as rarely as it begins a name.
    is_initial = len(word) == 1 and word.isupper()
    return is_initial or word.lower() in _ABBREVIATIONS


def folded(text: str) -> str:
    """Lower case without accents, with plain quotes: what names are compared as."""
    if text.isascii():
        return text.lower()
    plain = unicodedata.normalize("NFKD", text.replace("’", "'").replace("‘", "'"))
    return "".join(each for each in plain if not unicodedata.combining(each)).lower()


def words(text: str) -> list[str]:
    """Words in order, letters alone, as they are written."""
    return _WORD.findall(text)


@functools.lru_cache(maxsize=CACHED_WORDS)
def stem(word: str) -> str:
    """A word without its English endings, roughly: *founded*, *founding*, *founds* are one."""
    found = folded(word).removesuffix("'s").removesuffix("'")
    for ending in ("ations", "ation", "ings", "ing", "ies", "ied", "edly", "ed", "es", "ly", "s"):
        if found.endswith(ending) and len(found) - len(ending) >= 3:
            found = found[: -len(ending)] + ("y" if ending in ("ies", "ied") else "")
            break
    if len(found) > 3 and found[-1] == found[-2]:  # stopped: stopp
        found = found[:-1]
    return found.removesuffix("e") if len(found) > 3 else found


def content(text: str) -> list[str]:
    """Stems of the words that carry content, in order."""
    return [stem(word) for word in words(text) if folded(word) not in FUNCTION_WORDS]
