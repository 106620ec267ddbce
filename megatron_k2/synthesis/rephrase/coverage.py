"""Whether a rewritten piece still is its piece: nothing dropped, repeated or cut.

Cheap, before any model is asked; a piece that fails is asked for again with another seed. That all
is said rightly is the gate's to see, and so is one sentence of many that is left out.
"""

import re

from megatron_k2.fidelity.quantities import quantities, shown
from megatron_k2.fidelity.sentences import content, folded, sentences, words
from megatron_k2.fidelity.surface import aligned, names

LEAST_WORDS, MOST_WORDS = 0.4, 4.0
"""A rewrite's words over its piece's: a list of questions and answers takes up to three times."""
_SHORT = 12
"""Words up to which a piece may grow and shrink by any factor."""
_GONE = 0.1
"""Share of a sentence's content up to which it is not there."""
_MOST_GONE = 0.25
_LOST_ANCHORS = 0.5
_LEAST_ANCHORS = 3
_END = re.compile(r"""[.!?…。！？:;)\]}"'”’»`*|$]\s*\Z""")
_RUN, _REPEATED = 6, 0.5
"""Words in a row by which repetition is seen, and the share of them that is one."""


def piece_problem(
    piece: str, rewrite: str, *, before: str = "", written: str = "", is_translated: bool = False
) -> str | None:
    """Why a rewrite cannot stand for its piece; ``None`` where nothing was seen.

    Args:
        piece: of the source.
        rewrite: of it.
        before: the source before the piece: what it repeats of itself may be repeated.
        written: rewrites of what is before.
        is_translated: whether they are in two languages, so that only lengths and digits tell.
    """
    there, here = len(words(piece)), len(words(rewrite))
    if not rewrite.strip():
        return "the rewrite is empty"
    if there > _SHORT and not LEAST_WORDS <= here / there <= MOST_WORDS:
        return f"{here} words for {there}"
    if is_translated:
        return None
    if written and (share := _repeated(rewrite, written)) > _REPEATED >= _repeated(piece, before):
        return f"{share:.0%} of it repeats what was written before"
    if _END.search(piece) and not _END.search(rewrite):
        return f"it ends within a sentence: {rewrite.strip()[-60:]!r}"
    lost = _lost_anchors(piece, rewrite)
    if lost:
        return f"names and numbers are lost: {', '.join(lost[:5])}"
    return _gone_sentences(piece, rewrite)


def _gone_sentences(piece: str, rewrite: str) -> str | None:
    pairs = [pair for pair in aligned(piece, rewrite) if len(content(pair.sentence)) >= 3]
    gone = [pair for pair in pairs if pair.overlap <= _GONE]
    if not gone:
        return None
    if len(gone) > _MOST_GONE * len(pairs):
        return f"{len(gone)} of {len(pairs)} sentences are not there: {_shown(gone[0].sentence)}"
    if gone[-1] is pairs[-1]:
        return f"its end is not there: {_shown(gone[-1].sentence)}"
    return None


def _shown(sentence: str) -> str:
    return repr(sentence.strip())[:120]


def _lost_anchors(piece: str, rewrite: str) -> list[str]:
    """Names and numbers of the piece that are gone, where that is most of them."""
    text = folded(rewrite)
    kept = {each.value for each in quantities(rewrite)}
    numbers = dict.fromkeys(q.value for q in quantities(piece) if not q.is_idle)
    all_names = names(piece)
    lost = [each for each in all_names if folded(each)[:5] not in text]
    lost += [shown(value) for value in numbers if value not in kept]
    total = len(all_names) + len(numbers)
    return lost if total >= _LEAST_ANCHORS and len(lost) > _LOST_ANCHORS * total else []


def _repeated(text: str, before: str) -> float:
    """Share of a text's runs of words that ``before`` has."""
    own = _runs(text)
    return len(own & _runs(before)) / len(own) if own else 0.0


def _runs(text: str) -> set[tuple[str, ...]]:
    found: set[tuple[str, ...]] = set()
    for sentence in sentences(text):
        plain = [folded(word) for word in words(sentence)]
        found.update(tuple(plain[i : i + _RUN]) for i in range(len(plain) - _RUN + 1))
    return found
