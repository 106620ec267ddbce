"""Answers as a critic may see them: text addressed to whoever judges is taken out, and counted.

An answer is data. What it says to a grader (choose me, ignore the rubric, a verdict of its own, a
turn of another role) is no part of an answer to the user, and eight of ten such texts move a judge
that reads them. Whole sentences go, so that nothing of them is left to obey; what remains is judged
as it is. That something was removed is said in the record, not to the critic.
"""

import functools
import re
import unicodedata
from typing import NamedTuple

CACHED = 512
"""Answers whose result is kept: each of a group is compared with all the others."""
_INVISIBLE = re.compile(
    r"[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\U000e0000-\U000e007f]"
)
_JUDGE = (
    r"(?:grader|grading|judge|judging|evaluator|evaluation|evaluating|reviewer|rater|rating|critic|"
    r"assessor|scorer|scoring|examiner|annotator|arbiter|moderator|referee)s?"
)
_ANSWER = r"(?:answer|response|reply|output|option|candidate|submission|completion|solution|text)s?"
_WIN = (
    r"(?:choose|pick|select|prefer|favou?r|vote|award|rank|rate|score|mark|grade|declare|output|"
    r"print|return|say|reply|respond|answer|give|assign|conclude|accept|crown|endorse)"
)
_BEST = (
    r"(?:best|better|winner|winning|win|correct|superior|preferred|first|top|highest|maximum|full|"
    r"perfect|10|100|ten|verdict|[ab])"
)
_ATTACKS = (
    # to the judge by name, with something to do
    rf"\b{_JUDGE}\b[^.!?\n]{{0,80}}\b(?:choose|pick|select|prefer|rate|score|rank|mark|grade|"
    r"output|print|return|award|give|assign|declare|accept)\b[^.!?\n]{0,40}\b(?:this|my|me|mine|"
    rf"10|100|full|highest|maximum|top|first|second|{_ANSWER}|[ab])\b",
    rf"\b(?:note|message|instruction|memo|notice|reminder)s? (?:to|for) "
    rf"(?:the |any |all |every |our )?{_JUDGE}\b",
    rf"\b(?:dear|hey|hello|attention|important)\b\W{{1,3}}(?:the |all )?{_JUDGE}\b\W*[,:!]",
    rf"^\W*(?:to (?:the )?)?{_JUDGE}\s*[:,]",
    # away with the standard
    r"\b(?:ignore|disregard|forget|override|overrule|bypass|set aside|do not (?:use|apply|follow))"
    r"\b"
    r"[^.!?\n]{0,60}\b(?:rubric|criteria|criterion|instruction|guideline|prompt|standard)s?\b",
    # choose this one
    rf"\b{_WIN}\b[^.!?\n]{{0,50}}\b(?:this|my|the (?:first|second|current|present|above)|{_ANSWER} "
    rf"[ab12])\b[^.!?\n]{{0,20}}\b{_ANSWER}\b",
    rf"\b(?:this|my|the (?:first|second|present)) {_ANSWER}\b[^.!?\n]{{0,60}}\b(?:must|should|"
    rf"shall|has to|is to|deserves?|ought to)\b[^.!?\n]{{0,40}}\b(?:{_BEST}|chosen|picked|"
    r"selected|ranked|rated|scored|graded|marked|preferred)\b",
    rf"\b(?:other|second|first|alternative|competing|opposing) {_ANSWER}\b[^.!?\n]{{0,60}}"
    r"\b(?:wrong|incorrect|worse|inferior|invalid|unsafe|plagiari\w+|disqualified|lose|loses|harmful)"
    r"\b",
    # a verdict, a score or a turn of its own
    r"\b(?:verdict|final (?:score|grade|decision|judg(?:e)?ment|ruling)|better_?answer|result of "
    r"(?:the )?comparison)\b\W{0,4}(?:is|=|:)?\W{0,4}\b(?:a|b|1|2|first|second|this|mine|10|100)\b",
    r"\[\[\s*[ab]\s*\]\]",
    rf"\b{_ANSWER} [ab]\b[^.!?\n]{{0,40}}\b(?:is|wins?|should|must)\b[^.!?\n]{{0,20}}\b{_BEST}\b",
    r"<\|[^|\n]{1,40}\|>|</?(?:system|instructions?|assistant|rubric|verdict|judge|answer_?[ab])>",
    r"\byou (?:are|must|should|have to|will|need to)\b[^.!?\n]{0,40}\b(?:choose|pick|select|"
    r"prefer|rank|rate|score|vote|favou?r|award)\b[^.!?\n]{0,30}\b(?:this|my|me)\b",
)
"""What is said to a judge and to nobody else: an answer that says it loses to one that does not."""
_SUSPECT = (
    r"\b(?:score|rating|grade|mark)s?\b\W{0,3}(?:is|=|:)?\W{0,3}(?:10|100|5|full|maximum|perfect)"
    r"\b\W{0,3}(?:/|out of|points|marks|$)",
    r"\b(?:rate|score|grade|mark|give)\b[^.!?\n]{0,40}\b(?:10|100|5)\s*(?:/|out of)\s*(?:10|100|5)"
    r"\b",
    r"^\W*(?:system|developer|assistant|instruction)s?\s*(?:message|prompt|note|override)?\s*"
    r"(?:\]|>|:)",
    r"\b(?:ignore|disregard|forget)\b[^.!?\n]{0,30}\b(?:previous|above|prior|earlier|system) "
    r"(?:instruction|prompt|message|rule|text|answer|response|direction|order)s?\b",
    r"\b(?:new|updated|revised|real|secret|hidden) (?:instruction|rubric|guideline|criteria)s?\b",
    r"\b(?:pre-?approved|human[- ]verified|gold[- ]standard|ground[- ]truth|reference answer|"
    r"already (?:been )?(?:verified|checked|graded|approved)|has been verified)\b",
)
"""What may be said to a user as well: taken out, and nothing else."""
_ATTACK, _ADDRESSED = (
    re.compile("|".join(f"(?:{pattern})" for pattern in patterns), re.IGNORECASE | re.MULTILINE)
    for patterns in (_ATTACKS, _ATTACKS + _SUSPECT)
)
_ABOUT = re.compile(
    rf"\b(?:{_JUDGE}|injection|jailbreak\w*|rubric|score|grade|rate|rank|compare|review|verdict|"
    r"prefer|which (?:is|one|of))\b",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"[^.!?\n]*(?:[.!?]+(?=\s|$)|\n+|$)")


class Neutral(NamedTuple):
    """An answer without what was addressed to its judge."""

    text: str
    num_removed: int
    """Sentences."""
    is_attack: bool
    """Whether one of them can have been meant for a judge alone."""


@functools.lru_cache(maxsize=CACHED)
def neutral(answer: str) -> Neutral:
    """Take out sentences that address a judge; letters that look like others are read as those.

    Args:
        answer: as the model wrote it.
    """
    kept: list[str] = []
    removed, is_attack = 0, False
    for match in _SENTENCE.finditer(_INVISIBLE.sub("", answer)):
        sentence = match.group()
        if not sentence:
            continue
        said, plain = sentence.strip(), _plain(sentence).strip()
        if plain != said:
            said = f"{said}\n{plain}"
        if _ADDRESSED.search(said):
            removed += 1
            is_attack |= bool(_ATTACK.search(said))
            kept.append("\n" if sentence.endswith("\n") else "")
        else:
            kept.append(sentence)
    return Neutral("".join(kept).strip(), removed, is_attack)


def is_about_judging(prompt: str) -> bool:
    """Whether a request itself speaks of judging, so that an honest answer may, too."""
    return bool(_ABOUT.search(prompt) or _ATTACK.search(prompt))


def _plain(sentence: str) -> str:
    """Compatibility forms folded, marks dropped, spaced-out and decorated words joined."""
    folded = unicodedata.normalize("NFKD", sentence)
    letters = "".join(c for c in folded if not unicodedata.combining(c))
    letters = re.sub(r"[*_~`#|\\]+", "", letters.translate(_LOOKALIKES))
    return re.sub(r"\b(?:\w ){3,}\w\b", lambda m: m.group().replace(" ", ""), letters)


_LOOKALIKES = str.maketrans(
    "аеорсухіјѕԁɡʟɴАВЕКМНОРСТХІЅЈΑΒΕΗΙΚΜΝΟΡΤΧοαερικνυ",
    "aeopcyxijsdglnABEKMHOPCTXISJABEHIKMNOPTXoaepiknu",
)
"""Cyrillic and Greek letters that pass for Latin ones."""
