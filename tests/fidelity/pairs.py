"""Pairs of a source and a rewrite of known truth, and a critic that errs at a stated rate.

Faithful rewrites change the style (prose, dialogue, questions and answers, notes, another order,
digits and words); unfaithful ones are of one kind each, in a style as well. Split by topic: nothing
is tuned on the test half.
"""

import json
import random
import re
from dataclasses import dataclass

from megatron_k2.fidelity.statements import LETTERS, Support
from tests.fidelity.passages import PASSAGES, Passage

STYLES = ("prose", "dialogue", "questions", "notes", "reordered", "digits_and_words")
KINDS = ("number", "swapped_numbers", "entity", "roles", "negation", "order", "addition")
ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen".split()


@dataclass(frozen=True)
class Pair:
    topic: str
    source: str
    rewrite: str
    kind: str
    """``faithful``, or what is wrong."""
    half: str


def pairs() -> list[Pair]:
    topics = sorted({passage.topic for passage in PASSAGES})
    found = []
    for number, passage in enumerate(PASSAGES):
        half = "tuning" if topics.index(passage.topic) % 2 else "test"
        source = " ".join(each for each, _ in passage.said)
        good = [other for _, other in passage.said]
        made = [("faithful", styled(style, good, number)) for style in STYLES]
        for place, kind in enumerate((*KINDS, "omission")):
            bad = _spoilt(passage, kind, number)
            made.append((kind, styled(STYLES[(number + place) % len(STYLES)], bad, number)))
        found += [Pair(passage.topic, source, text, kind, half) for kind, text in made]
    return found


def _spoilt(passage: Passage, kind: str, seed: int) -> list[str]:
    good = [other for _, other in passage.said]
    if kind == "omission":
        del good[seed % len(good)]
        return good
    place, text = passage.wrong[kind]
    return [*good[:place], text, *good[place + (kind != "addition") :]]


def styled(style: str, sentences: list[str], seed: int) -> str:
    match style:
        case "dialogue":
            openings = (
                "Do you know anything about this?",
                "What else?",
                "Go on.",
                "And then?",
                "Really?",
            )
            turns = zip(openings, sentences, strict=False)
            return "\n".join(f"Mira: {ask}\nPaul: {said}" for ask, said in turns)
        case "questions":
            return "\n".join(f"Q: What is known here?\nA: {said}" for said in sentences)
        case "notes":
            return "\n".join(f"- {said}" for said in sentences)
        case "reordered":
            order = random.Random(seed)
            mixed = list(sentences)
            order.shuffle(mixed)
            return " ".join(mixed)
        case "digits_and_words":
            return " ".join(_numbers_turned(said) for said in sentences)
    return " ".join(sentences)


def _numbers_turned(text: str) -> str:
    """Small digits as words, small words as digits; others keep their form."""
    spelled = re.sub(
        r"(?<![\w.,:])(\d{1,2})(?![\w.,:]|\.\d)",
        lambda found: ONES[int(found[1])] if int(found[1]) < len(ONES) else found[1],
        text,
    )
    if spelled != text:
        return spelled
    return re.sub(
        rf"(?<!-)\b({'|'.join(ONES[3:])})\b(?! million)",
        lambda found: str(ONES.index(found[1].lower())),
        text,
        flags=re.IGNORECASE,
    )


class ScriptedCritic:
    """Knows the truth of every statement, and says something else at a stated rate.

    Draws hang on the question, so that another vote errs apart from this one. It reads the two JSON
    strings and the meanings of the letters, and heeds nothing that stands inside them.
    """

    name = "scripted"

    def __init__(self, known: list[Pair], accuracy: float, seed: int = 0) -> None:
        self.accuracy, self.seed, self.num_questions = accuracy, seed, 0
        self._facts = {}
        for passage in PASSAGES:
            for place, (said, other) in enumerate(passage.said):
                for text in (said, other, _numbers_turned(other)):
                    self._facts[text] = (passage.topic, said, place)
        self._known = known

    def is_supported(self, text: str, statement: str) -> bool:
        """By the facts alone: both say the same sentence of the same passage."""
        key = self._facts.get(statement)
        return key is not None and any(
            form in text for form, found in self._facts.items() if found == key
        )

    async def letter(self, system, user, letters):
        assert tuple(letters) == LETTERS
        assert "data" in system
        self.num_questions += 1
        text = json.loads(re.search(r'^Text: (".*")$', user, re.MULTILINE)[1])
        statement = json.loads(re.search(r'^Statement: (".*")$', user, re.MULTILINE)[1])
        meaning = {each[0]: each[3:] for each in user.splitlines() if re.match(r"^[ABC]: ", each)}
        by_meaning = {
            Support.SUPPORTED: next(
                k for k, v in meaning.items() if v.startswith("the text says this")
            ),
            Support.ABSENT: next(k for k, v in meaning.items() if "does not say" in v),
        }
        truth = self.is_supported(text, statement)
        draw = random.Random(f"{self.seed}/{user}").random()
        said = truth if draw < self.accuracy else not truth
        return {by_meaning[Support.SUPPORTED if said else Support.ABSENT]: 1.0}

    async def items(self, system, user):
        return None
