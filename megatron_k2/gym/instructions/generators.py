"""Prompts with one to three constraints that go together, and an answer that follows them.

The answer is written from sentences on the topic and bent to each constraint in turn; a draw whose
answer does not pass the checker is drawn again, so that no two constraints contradict each other.
"""

import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.gym.instructions.check import check
from megatron_k2.gym.instructions.constraints import asks
from megatron_k2.gym.instructions.env import NAME
from megatron_k2.gym.protocol import Task

TOPICS: dict[str, list[str]] = {
    "how bread is made": ["bread", "dough", "flour", "yeast", "oven", "bak"],
    "why the sea is salty": ["sea", "salt", "ocean", "water", "river", "mineral"],
    "what a bicycle chain does": ["bicycl", "chain", "wheel", "pedal", "gear"],
    "how bees make honey": ["bee", "honey", "nectar", "hive", "flower"],
    "why leaves turn red": ["leave", "leaf", "red", "autumn", "tree", "colour"],
    "how a library is ordered": ["librar", "book", "shel", "catalogue", "reader"],
}
SENTENCES = (
    "The {a} and the {b} come first in every account of {topic}.",
    "A patient observer sees how {b} changes while {a} stays much the same.",
    "Without {a} there would be little to say on the matter of {b}.",
    "Old manuals describe {a} at length and treat {b} in passing.",
    "Children often ask about {b} before anyone explains {a} to them.",
    "In the end {topic} is a question of {a} meeting {b} at the right time.",
)
type Bend = Callable[[str, dict[str, Any]], str]


def _bullets(text: str, given: dict[str, Any]) -> str:
    lines = "\n".join(f"- point {number}" for number in range(given["number"]))
    return f"{text}\n{lines}"


def _sentences(text: str, given: dict[str, Any]) -> str:
    parts = [part.strip() + "." for part in text.split(".") if part.strip()]
    return " ".join((parts * given["number"])[: given["number"]])


def _paragraphs(text: str, given: dict[str, Any]) -> str:
    return "\n\n".join([text] * given["number"])


BENDS: dict[str, tuple[Bend, Callable[[random.Random], dict[str, Any]]]] = {
    "least_words": (lambda t, g: t, lambda r: {"number": r.randint(10, 30)}),
    "most_words": (lambda t, g: t, lambda r: {"number": r.randint(80, 200)}),
    "num_sentences": (_sentences, lambda r: {"number": r.randint(2, 5)}),
    "num_paragraphs": (_paragraphs, lambda r: {"number": r.randint(2, 3)}),
    "num_bullets": (_bullets, lambda r: {"number": r.randint(2, 5)}),
    "includes_word": (
        lambda t, g: t + f" Mark {g['word']}." * g["number"],
        lambda r: {"word": r.choice(["copper", "lantern", "meadow"]), "number": r.randint(1, 3)},
    ),
    "excludes_word": (lambda t, g: t, lambda r: {"word": r.choice(["very", "really", "quite"])}),
    "begins_with": (
        lambda t, g: f"{g['phrase']}, {t}",
        lambda r: {"phrase": r.choice(["To begin with", "Broadly speaking"])},
    ),
    "ends_with": (
        lambda t, g: f"{t} {g['phrase']}",
        lambda r: {"phrase": r.choice(["So it goes.", "That is the whole story."])},
    ),
    "lower_case": (lambda t, g: t.lower(), lambda r: {}),
    "upper_case": (lambda t, g: t.upper(), lambda r: {}),
    "no_commas": (lambda t, g: t.replace(",", ""), lambda r: {}),
    "title": (lambda t, g: f"<<A title>>\n{t}", lambda r: {}),
    "postscript": (lambda t, g: f"{t}\nP.S. More another time.", lambda r: {}),
    "num_highlights": (
        lambda t, g: t + " *mark*" * g["number"],
        lambda r: {"number": r.randint(1, 3)},
    ),
    "num_placeholders": (
        lambda t, g: t + " [name]" * g["number"],
        lambda r: {"number": r.randint(1, 3)},
    ),
    "num_headings": (
        lambda t, g: "\n".join(["## Part"] * g["number"] + [t]),
        lambda r: {"number": r.randint(1, 3)},
    ),
    "quoted": (lambda t, g: f'"{t}"', lambda r: {}),
}


class InstructionGenerator:
    """Topics and constraints drawn together.

    Args:
        weights: how often a kind is drawn against others, by kind; all alike by default. Kinds that
            are not named have weight 0.

    Raises:
        UserError: a kind that is not known, or none with a weight.
    """

    name = f"{NAME}/constraints"
    domain = NAME

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        if unknown := sorted(set(weights or ()) - set(BENDS)):
            raise UserError(f"no constraint {unknown[0]!r}; one of: {', '.join(sorted(BENDS))}")
        self._weights = {kind: 1.0 if weights is None else weights.get(kind, 0.0) for kind in BENDS}
        if not any(weight > 0 for weight in self._weights.values()):
            raise UserError("no kind of constraint has a weight; expected one over 0")

    def sample(self, number: int, seed: int) -> list[Task]:
        """Prompts drawn from (seed, place)."""
        return [self._made(seed, place)[0] for place in range(number)]

    def oracle(self, task: Task) -> str:
        """The answer that was written with the prompt."""
        seed, place = task.id.rsplit("-", 2)[1:]
        return self._made(int(seed), int(place))[1]

    def _kinds(self, order: random.Random, number: int) -> list[str]:
        """Different kinds, drawn by weight one after another."""
        left = {kind: weight for kind, weight in sorted(self._weights.items()) if weight > 0}
        found: list[str] = []
        while left and len(found) < number:
            (kind,) = order.choices(list(left), list(left.values()))
            found.append(kind)
            del left[kind]
        return found

    def _made(self, seed: int, place: int) -> tuple[Task, str]:
        order = random.Random(f"{seed}/{self.name}/{place}")
        while True:
            title, stems = order.choice(list(TOPICS.items()))
            kinds = self._kinds(order, order.randint(1, 3))
            given = [{"kind": kind, **BENDS[kind][1](order)} for kind in kinds]
            answer = _text(order, title, stems)
            for constraint in given:
                answer = BENDS[constraint["kind"]][0](answer, constraint)
            if check(given, stems, answer)["outcome"] == "right":
                break
        sentences = [asks(g["kind"], {k: v for k, v in g.items() if k != "kind"}) for g in given]
        prompt = f"Write a short text on {title}. {' '.join(sentences)}"
        reference = {"constraints": given, "topic": stems}
        return Task(
            NAME, prompt, reference, f"constraints-{seed}-{place}", source=self.name
        ), answer


def failure_rates(details: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Share of answers that did not follow a kind of constraint, from verdicts' ``details``.

    As ``weights`` of the generator they make tasks that probe where a policy fails. A kind that was
    seen n times and always held keeps 1 / (n + 2), so that it is asked again now and then.
    """
    seen: dict[str, list[bool]] = {}
    for each in details:
        for name, is_held in (each.get("constraints") or {}).items():
            seen.setdefault(name.partition(" ")[2], []).append(bool(is_held))
    return {
        kind: (held.count(False) + 1) / (len(held) + 2)
        for kind, held in seen.items()
        if kind in BENDS
    }


def _text(order: random.Random, title: str, stems: list[str]) -> str:
    chosen = order.sample(SENTENCES, 4)
    return " ".join(
        sentence.format(a=a, b=b, topic=title)
        for sentence, (a, b) in zip(chosen, (order.sample(stems, 2) for _ in chosen), strict=True)
    )
