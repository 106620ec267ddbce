"""Whether an answer follows its instructions: it is there, on task, and every constraint holds.

A checker alone is passed by an empty answer (no comma, at most 50 words). That an answer is on task
is asked of what is left when it no longer speaks of itself, and so is a constraint that asks for
more of something: "this text has the word ocean, ocean, ocean" pays nothing.
"""

from typing import Any

from megatron_k2.gym.instructions.claims import claims_in, without_claims
from megatron_k2.gym.instructions.constraints import KINDS, words

LEAST_WORDS = 5
"""Of an answer that says something."""
LEAST_VARIETY = 0.25
"""Different words over words, of the first hundred: less is one thing said again and again."""


def off_task(text: str, topic: list[str]) -> str:
    """Why a text says nothing on its topic; ``""`` if it does.

    Args:
        text: of the answer.
        topic: beginnings of words, of which two must occur, or the one there is.
    """
    found = words(text)
    if len(found) < LEAST_WORDS:
        return f"{len(found)} words; at least {LEAST_WORDS} say something"
    if len(set(found[:100])) < LEAST_VARIETY * len(found[:100]):
        return "it says the same again and again"
    hit = {stem for stem in topic if any(word.startswith(stem) for word in found)}
    return "" if len(hit) >= min(2, len(topic)) else "it is not on its topic"


def check(constraints: list[dict[str, Any]], topic: list[str], answer: str) -> dict[str, Any]:
    """The verdict as JSON, with that of every constraint.

    Raises:
        KeyError: a constraint of a kind that is not known.
    """
    claims, own = claims_in(answer), without_claims(answer)
    details: dict[str, Any] = {"claims": claims}
    if why := off_task(own, topic):
        return {"outcome": "wrong", "evidence": why, "details": details}
    held = {}
    for number, constraint in enumerate(constraints):
        arguments = {name: value for name, value in constraint.items() if name != "kind"}
        kind = KINDS[constraint["kind"]]
        texts = (answer, own) if kind.counts_own else (answer,)
        held[f"{number} {constraint['kind']}"] = all(
            kind.holds(text, **arguments) for text in texts
        )
    details["constraints"] = held
    failed = [name for name, is_held in held.items() if not is_held]
    details["is_false_claim"] = bool(failed and claims)
    evidence = f"not followed: {', '.join(failed)}" if failed else "every constraint holds"
    return {"outcome": "wrong" if failed else "right", "evidence": evidence, "details": details}
