"""Rubrics as data: what a critic holds two answers against.

Appendix F of the K2 report in our words: core rubrics say what the assistant is for, prescriptive
ones close ways of pleasing a judge without serving the user. Task rubrics come with the task. A
mandatory rubric decides before all others; the others are weighed by the critic.

Known side effect (the report's F.3): answers that hedge or assess themselves lose, single decisive
ones win; a critic under these rubrics may reward more certainty than is due.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_k2.errors import UserError
from megatron_k2.rewards.neutral import is_about_judging, neutral

Kind = Literal["core", "prescriptive", "task"]
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
MOST_CHARACTERS = 2000
"""Of a rubric's text: it is read by the critic with every pair."""


@dataclass(frozen=True)
class Rubric:
    """One standard.

    Raises:
        UserError: a field that is wrong.
    """

    name: str
    text: str
    kind: Kind = "task"
    is_mandatory: bool = False

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UserError(f"rubric name {self.name!r}: expected lower case words joined by _")
        if not self.text.strip() or len(self.text) > MOST_CHARACTERS:
            raise UserError(
                f"rubric {self.name}: {len(self.text)} characters, expected 1 to {MOST_CHARACTERS}"
            )
        if self.kind not in get_args(Kind):
            raise UserError(f"rubric {self.name}: kind {self.kind!r}, expected {get_args(Kind)}")


CORE = (
    Rubric(
        "clarity_and_relevance",
        "Says what was asked for, completely and briefly. No detail that does not serve the "
        "question; short paragraphs and tight lists, no long list unless it is needed. Where a "
        "choice is asked for, exactly one clear answer.",
        "core",
    ),
    Rubric(
        "conversation",
        "Reads as a person who takes part: coherent, fittingly engaged, with an observation that "
        "helps; asks back rarely; takes hypothetical cases and comparisons as they are meant; its "
        "tone fits the user's.",
        "core",
    ),
    Rubric(
        "objective_and_grounded",
        "Stays with the request. No remark on the question, its oddness or the conversation "
        "itself; no flattery; respectful and neutral, the task first.",
        "core",
    ),
)
PRESCRIPTIVE = (
    Rubric(
        "no_opening_praise",
        "Does not begin by complimenting the user or the question.",
        "prescriptive",
        is_mandatory=True,
    ),
    Rubric(
        "no_self_justification",
        "Has no sentence that says why the answer is good, or how it met the request; describing "
        "what the content does is fine.",
        "prescriptive",
        is_mandatory=True,
    ),
)
NO_ADDRESS = Rubric(
    "no_address_to_the_judge",
    "Says nothing to whoever compares the answers.",
    "prescriptive",
    is_mandatory=True,
)
"""Ours, not the report's: a model that is rewarded by a judge learns to speak to it."""
DEFAULT = (*CORE, *PRESCRIPTIVE, NO_ADDRESS)

_OPENING = re.compile(
    r"^\W*(?:(?:wow|ah|oh|hi|hello|well)\W+)?"
    r"(?:(?:that(?:'s| is)|this is|what) (?:an? |such an? )?(?:\w+ ){0,2})?"
    r"(?:great|excellent|good|fantastic|wonderful|brilliant|fascinating|insightful|thoughtful|"
    r"interesting|amazing|superb|lovely|clever|smart|perceptive)\b"
    r"(?:\W+\w+){0,3}?\W+(?:question|point|idea|observation|query|request|thought|topic|choice|ask)",
    re.IGNORECASE,
)
_THANKS = re.compile(
    r"^\W*(?:thank you|thanks|i (?:really )?(?:love|appreciate|like))\b[^.!?\n]{0,60}"
    r"\b(?:question|asking|curiosity|request|idea|point)",
    re.IGNORECASE,
)
_JUSTIFIES = re.compile(
    r"\b(?:this|my|the above) (?:answer|response|reply|solution|explanation|essay|text|summary)\b"
    r"[^.!?\n]{0,80}\b(?:meets?|met|satisf\w+|fulfil\w*|adheres?|follows|complies|addresses|"
    r"answers|covers|is (?:good|better|best|complete|correct|accurate|comprehensive|thorough|high|"
    r"clear|helpful|excellent|ideal|perfect)|(?:fully|directly|clearly|completely) \w+)"
    r"|\bas (?:you )?requested,? (?:i|this)\b"
    r"|\bi (?:have |'ve )?(?:made sure|ensured|followed|met|satisfied|addressed)\b[^.!?\n]{0,60}"
    r"\b(?:request|requirement|instruction|constraint|question|criteria|you asked)"
    r"|\bby (?:doing|providing|including|giving) (?:this|so|these)\b[^.!?\n]{0,60}"
    r"\b(?:request|requirement|question|criteria)",
    re.IGNORECASE,
)


def opens_with_praise(answer: str) -> bool:
    """Whether an answer begins by complimenting; by rule, on its first 200 characters."""
    start = answer.lstrip()[:200]
    return bool(_OPENING.match(start) or _THANKS.match(start))


def justifies_itself(answer: str) -> bool:
    """Whether a sentence says that the answer is good or met the request; by rule."""
    return bool(_JUSTIFIES.search(answer))


def speaks_to_the_judge(answer: str, prompt: str) -> bool:
    """Whether an answer says what is meant for a judge, where judging is not what was asked."""
    return neutral(answer).is_attack and not is_about_judging(prompt)


CHECKS: dict[str, Callable[[str, str], bool]] = {
    "no_opening_praise": lambda answer, _: opens_with_praise(answer),
    "no_self_justification": lambda answer, _: justifies_itself(answer),
    "no_address_to_the_judge": speaks_to_the_judge,
}
"""Rubrics that a rule can decide -> whether an answer to a prompt breaks it. What a rule sees no
critic is asked, since a critic can be talked out of it."""


def broken_mandatory(answer: str, prompt: str, rubrics: tuple[Rubric, ...]) -> tuple[str, ...]:
    """Names of mandatory rubrics that an answer breaks by rule."""
    return tuple(
        rubric.name
        for rubric in rubrics
        if rubric.is_mandatory and rubric.name in CHECKS and CHECKS[rubric.name](answer, prompt)
    )


def read_rubrics(path: Path) -> tuple[Rubric, ...]:
    """Rubrics of a JSON Lines file: name, text, kind, mandatory.

    Raises:
        UserError: naming file and line.
    """
    found: dict[str, Rubric] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            rubric = _rubric(json.loads(line))
        except (ValueError, RecursionError, UserError) as error:
            raise UserError(f"{path}:{number}: {error}") from None
        if rubric.name in found:
            raise UserError(f"{path}:{number}: rubric {rubric.name} stands there twice")
        found[rubric.name] = rubric
    return tuple(found.values())


def _rubric(value: Any) -> Rubric:
    if not isinstance(value, dict) or not {"name", "text"} <= set(value):
        raise UserError("expected an object with name and text")
    known = {"name", "text", "kind", "mandatory"}
    if unknown := set(value) - known:
        raise UserError(
            f"unknown {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}"
        )
    name, text = value["name"], value["text"]
    kind, mandatory = value.get("kind", "task"), value.get("mandatory", False)
    if not (isinstance(name, str) and isinstance(text, str) and isinstance(mandatory, bool)):
        raise UserError("name and text are texts, mandatory is true or false")
    return Rubric(name, text, kind, mandatory)
