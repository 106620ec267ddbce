"""Constraints that code can check: what each asks for, and whether a text does it.

``KINDS`` is the published list: name, arguments, sentence, check. A check sees a text that is not
empty; that the text is there and on task is conjoined by ``instructions/check.py``.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
SENTENCE = re.compile(r"[^.!?]*[^\W_][^.!?]*[.!?]+")
BULLET = re.compile(r"^\s*[-*\u2022]\s+\S", re.MULTILINE)


@dataclass(frozen=True)
class Kind:
    """One kind of constraint."""

    parameters: Mapping[str, type]
    asks: str
    """Sentence of the prompt, with the parameters in braces."""
    holds: Callable[..., bool]
    """Of the text, and the arguments by name."""
    counts_own: bool = False
    """Whether it asks for more of something: that must hold without the answer's claims too."""


def words(text: str) -> list[str]:
    """Words, in lower case."""
    return [word.casefold() for word in WORD.findall(text)]


def num_sentences(text: str) -> int:
    """Sentences that end in a mark; a last one without counts."""
    rest = SENTENCE.sub("", text)
    return len(SENTENCE.findall(text)) + bool(WORD.search(rest))


def paragraphs(text: str) -> list[str]:
    """Parts with words between blank lines."""
    return [part for part in re.split(r"\n\s*\n", text.strip()) if WORD.search(part)]


def _is_json(text: str) -> bool:
    body = re.sub(r"^```(?:json)?\s*\n|\n```$", "", text.strip())
    try:
        return isinstance(json.loads(body), dict | list)
    except (ValueError, RecursionError):
        return False


def _count(text: str, word: str) -> int:
    return words(text).count(word.casefold())


KINDS: dict[str, Kind] = {
    "least_words": Kind(
        {"number": int},
        "Write at least {number} words.",
        lambda text, number: len(words(text)) >= number,
        counts_own=True,
    ),
    "most_words": Kind(
        {"number": int},
        "Write at most {number} words.",
        lambda text, number: len(words(text)) <= number,
    ),
    "num_sentences": Kind(
        {"number": int},
        "Write exactly {number} sentences.",
        lambda text, number: num_sentences(text) == number,
    ),
    "num_paragraphs": Kind(
        {"number": int},
        "Write exactly {number} paragraphs, with a blank line between them.",
        lambda text, number: len(paragraphs(text)) == number,
    ),
    "num_bullets": Kind(
        {"number": int},
        "Use exactly {number} bullet points, each on a line that begins with '- '.",
        lambda text, number: len(BULLET.findall(text)) == number,
    ),
    "includes_word": Kind(
        {"word": str, "number": int},
        "Use the word '{word}' at least {number} times.",
        lambda text, word, number: _count(text, word) >= number,
        counts_own=True,
    ),
    "excludes_word": Kind(
        {"word": str},
        "Do not use the word '{word}'.",
        lambda text, word: _count(text, word) == 0,
    ),
    "begins_with": Kind(
        {"phrase": str},
        "Begin with the words '{phrase}'.",
        lambda text, phrase: text.strip().startswith(phrase),
    ),
    "ends_with": Kind(
        {"phrase": str},
        "End with the words '{phrase}', and nothing after them.",
        lambda text, phrase: text.strip().endswith(phrase),
    ),
    "lower_case": Kind(
        {},
        "Write in lower case letters only.",
        lambda text: text == text.lower() and any(map(str.isalpha, text)),
    ),
    "upper_case": Kind(
        {},
        "Write in capital letters only.",
        lambda text: text == text.upper() and any(map(str.isalpha, text)),
    ),
    "no_commas": Kind({}, "Do not use a comma.", lambda text: "," not in text),
    "json": Kind({}, "Answer in JSON alone.", _is_json),
    "title": Kind(
        {},
        "Put a title in double angle brackets, as <<title>>.",
        lambda text: bool(re.search(r"<<[^<>\n]*\w[^<>\n]*>>", text)),
    ),
    "postscript": Kind(
        {},
        "End with a postscript that begins with 'P.S.'.",
        lambda text: bool(re.search(r"^P\.S\.\s*\S", text.strip().split("\n")[-1])),
    ),
    "num_highlights": Kind(
        {"number": int},
        "Highlight at least {number} parts, as *part*.",
        lambda text, number: len(re.findall(r"(?<!\*)\*[^*\s][^*\n]*\*(?!\*)", text)) >= number,
        counts_own=True,
    ),
    "num_placeholders": Kind(
        {"number": int},
        "Use at least {number} placeholders in square brackets, as [name].",
        lambda text, number: len(re.findall(r"\[[^\[\]\n]+\]", text)) >= number,
        counts_own=True,
    ),
    "num_headings": Kind(
        {"number": int},
        "Use exactly {number} headings, each on a line that begins with '## '.",
        lambda text, number: len(re.findall(r"^## \S", text, re.MULTILINE)) == number,
    ),
    "least_letter": Kind(
        {"letter": str, "number": int},
        "Use the letter '{letter}' at least {number} times.",
        lambda text, letter, number: text.casefold().count(letter.casefold()) >= number,
        counts_own=True,
    ),
    "quoted": Kind(
        {},
        "Put all of your answer in double quotes.",
        lambda text: len(text.strip()) > 2 and text.strip()[0] == text.strip()[-1] == '"',
    ),
}


def asks(kind: str, arguments: Mapping[str, Any]) -> str:
    """A constraint as a sentence of the prompt."""
    return KINDS[kind].asks.format(**arguments)
