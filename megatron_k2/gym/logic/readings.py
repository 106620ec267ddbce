"""Two more of the report's puzzles: Morse code read or written, and reasoning over a table."""

import random
import re
from collections.abc import Callable
from typing import Any

from megatron_k2.gym.logic.puzzles import Found, committed, found

MORSE = dict(
    zip(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789",
        ".- -... -.-. -.. . ..-. --. .... .. .--- -.- .-.. -- -. --- .--. --.- .-. ... - ..- ...- "
        ".-- -..- -.-- --.. ----- .---- ..--- ...-- ....- ..... -.... --... ---.. ----.".split(),
        strict=True,
    )
)
WORDS = (
    "HARBOUR LANTERN SIGNAL WINTER COPPER MEADOW RIVER BRIDGE GARDEN PEPPER SILVER MARKET THUNDER "
    "ISLAND QUARRY VIOLET JACKET ZEPHYR FALCON WIDOW"
).split()
_NAMES = "Ada Ben Cleo Dan Eva Finn Gus Hana Ivo Jana".split()
_TOWNS = "Arnby Dorn Fell Karst Lisk".split()


def in_morse(text: str) -> str:
    """Letters apart by a space, words by a stroke."""
    return " / ".join(" ".join(MORSE[letter] for letter in word) for word in text.split())


def check_morse(text: str, is_read: bool, answer: str) -> Found:
    """The words that the code says, or the code of the words; spaces and case aside."""
    said = committed(answer).strip(" .\"'`") if is_read else committed(answer)
    if is_read:
        plain = " ".join(re.findall(r"[A-Z0-9]+", said.upper()))
        return found(plain == text, f"{plain[:80]!r}, of {text!r}")
    code = re.sub(r"\s*/\s*", " / ", said.replace("·", ".").replace("−", "-"))
    code = " ".join(code.split())
    return found(code == in_morse(text), f"{code[:80]!r}")


def check_table(value: str, answer: str) -> Found:
    """The one cell or number that was asked for, and nothing beside it."""
    said = committed(answer).strip(" .\"'`")
    return found(said.lower() == value.lower(), f"{said[:80]!r}, of {value!r}")


def make_morse(order: random.Random) -> tuple[str, dict[str, Any], str]:
    """Two or three words, one way or the other."""
    words = order.sample(WORDS, order.choice((2, 3)))
    text = f"{' '.join(words)} {order.randint(10, 999)}"
    is_read = order.random() < 0.5
    if is_read:
        asked = f"Read this Morse code (words are apart by /): {in_morse(text)}"
        asked += "\nAnswer with the words alone."
        return asked, {"text": text, "is_read": True}, text
    asked = f"Write in Morse code, letters apart by a space and words by /: {text}"
    asked += "\nAnswer with the code alone."
    return asked, {"text": text, "is_read": False}, in_morse(text)


def make_table(order: random.Random) -> tuple[str, dict[str, Any], str]:
    """Six people with a town, an age and a score; a question of two steps."""
    names = order.sample(_NAMES, 6)
    ages, scores = order.sample(range(18, 90), 6), order.sample(range(10, 500), 6)
    rows = [
        (name, order.choice(_TOWNS[:3]), age, score)
        for name, age, score in zip(names, ages, scores, strict=True)
    ]
    town = order.choice(rows)[1]
    here = [row for row in rows if row[1] == town]
    questions = (
        (f"Who of {town} has the highest score?", max(here, key=lambda row: row[3])[0]),
        (f"Who of {town} is youngest?", min(here, key=lambda row: row[2])[0]),
        (f"What is the sum of the scores of {town}?", str(sum(row[3] for row in here))),
        (
            f"What is the score of the oldest who is not of {town}?",
            str(
                max(
                    (row for row in rows if row[1] != town), key=lambda row: row[2], default=rows[0]
                )[3]
            ),
        ),
    )
    usable = questions if len(here) < len(rows) else questions[:3]
    asked, value = order.choice(usable)
    lines = "\n".join(f"| {name} | {where} | {age} | {score} |" for name, where, age, score in rows)
    table = f"| name | town | age | score |\n|---|---|---|---|\n{lines}"
    return f"{table}\n\n{asked} Answer with the name or number alone.", {"value": value}, value


CHECKS: dict[str, Callable[..., Found]] = {"morse": check_morse, "table": check_table}
MAKERS = {"morse": make_morse, "table": make_table}
