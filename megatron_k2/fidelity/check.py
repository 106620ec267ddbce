"""The verdict on a rewrite: faithful, unfaithful, or unverified.

Layers. A number that the source has not refuses at once. Then a model is asked, statement by
statement, in both directions: what the rewrite says the source must support, and what the source
says the rewrite must (so that omissions are seen). Only this may say *faithful*; without a model
the verdict is *unverified*.

A statement that is not found supported at the first vote, or that surface signals speak against,
is asked again, and the majority counts: with a critic that is right nine times of ten a passage of
a dozen statements would else be refused in seven cases of ten. This assumes that votes err apart
from one another, which other letters and orders help to; a critic that misreads a sentence always
misreads it in every vote.
"""

import asyncio
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, NamedTuple

from megatron_k2.errors import UserError
from megatron_k2.fidelity.statements import (
    Asker,
    Opinion,
    Statement,
    Support,
    asked,
    extracted,
    statements,
)
from megatron_k2.fidelity.surface import Signal, Surface
from megatron_k2.files import sha256_of_json

Side = Literal["rewrite", "source"]


class Verdict(StrEnum):
    """On a rewrite."""

    FAITHFUL = "faithful"
    UNFAITHFUL = "unfaithful"
    UNVERIFIED = "unverified"


@dataclass(frozen=True)
class Settings:
    """How a model is asked.

    Raises:
        UserError: an even or no number of votes, or a share outside 0 to 1.
    """

    num_votes: int = 5
    """At most, on one statement."""
    extracts: bool = False
    """Whether the model lists the statements first; else they are the sentences."""
    least_support: float = 0.0
    """Under this mean P(supported) a statement fails, whatever the majority says."""
    has_gates: bool = True
    """Whether a number that the source has not refuses; not where the source is in a language
    whose number words are not read, or where new numbers are held to their arithmetic."""

    def __post_init__(self) -> None:
        if self.num_votes < 1 or self.num_votes % 2 == 0:
            raise UserError(f"num_votes {self.num_votes}: expected an odd number, 1 or more")
        if not 0 <= self.least_support <= 1:
            raise UserError(f"least_support {self.least_support}: expected 0 to 1")


class Finding(NamedTuple):
    """What the votes on one statement said."""

    statement: str
    side: Side
    """Whose statement it is; the other text was asked."""
    label: Support | None
    """The majority's; ``None`` where no vote could be read."""
    support: float
    """Mean P(supported) of the votes that count, 0 to 1."""
    num_votes: int

    def sentence(self) -> str:
        """For a person."""
        where = "source" if self.side == "rewrite" else "rewrite"
        what = "cannot be checked against" if self.label is None else f"{self.label} by"
        what = "not said in" if self.label is Support.ABSENT else what
        return f"{what} the {where}: {self.statement!r:.160}"


@dataclass(frozen=True)
class Fidelity:
    """A verdict with what it rests on."""

    verdict: Verdict
    reason: str
    """A sentence; of a refusal, which statement."""
    score: float | None = None
    """The least support of any statement, 0 to 1; ``None`` where no model was asked."""
    findings: tuple[Finding, ...] = ()
    gates: tuple[Signal, ...] = ()
    advice: tuple[Signal, ...] = field(default=())
    num_questions: int = 0


async def check(
    source: str,
    rewrite: str,
    asker: Asker | None,
    settings: Settings | None = None,
    before: str = "",
) -> Fidelity:
    """Whether a rewrite says what its source says.

    Args:
        source: what was rewritten.
        rewrite: of it.
        asker: the model; ``None``: nothing can be faithful.
        settings: how it is asked.
        before: what stands before ``source`` in its document. A rewrite may name what a pronoun
            stands for, so its statements are held against both; omissions are of ``source`` alone.

    Raises:
        Exception: whatever the asker raises where it does not answer.
    """
    surface, settings = Surface(source, rewrite), settings or Settings()
    if not rewrite.strip():
        return Fidelity(Verdict.UNFAITHFUL, "the rewrite is empty", 0.0)
    gates = tuple(Surface(before + source, rewrite).gates()) if settings.has_gates else ()
    advice = tuple(surface.advice())
    if gates:
        reason = f"{gates[0].name}: {gates[0].evidence}"
        return Fidelity(Verdict.UNFAITHFUL, reason, 0.0, gates=gates, advice=advice)
    if asker is None:
        return Fidelity(Verdict.UNVERIFIED, "no model was asked", gates=gates, advice=advice)
    findings = await _findings(source, rewrite, asker, settings, advice, before)
    number = sum(each.num_votes for each in findings)
    verdict, reason = _decided(findings, settings)
    score = min((each.support for each in findings), default=0.0)
    return Fidelity(verdict, reason, score, findings, gates, advice, number)


async def grounded(
    context: str, answer: str, asker: Asker, settings: Settings | None = None
) -> tuple[Finding, ...]:
    """Findings on an answer's statements alone: each must be supported by the context."""
    return await _side(asker, "rewrite", answer, context, settings or Settings(), frozenset())


async def _findings(
    source: str,
    rewrite: str,
    asker: Asker,
    settings: Settings,
    advice: tuple[Signal, ...],
    before: str,
) -> tuple[Finding, ...]:
    doubted = frozenset(each.evidence for each in advice)
    both = await asyncio.gather(
        _side(asker, "rewrite", rewrite, before + source, settings, doubted),
        _side(asker, "source", source, rewrite, settings, doubted),
    )
    return both[0] + both[1]


async def _side(
    asker: Asker, side: Side, own: str, other: str, settings: Settings, doubted: frozenset[str]
) -> tuple[Finding, ...]:
    listed = await extracted(asker, own) if settings.extracts else statements(own)
    findings = await asyncio.gather(
        *(_voted(asker, side, each, other, settings, doubted) for each in listed)
    )
    return tuple(findings)


async def _voted(
    asker: Asker,
    side: Side,
    statement: Statement,
    other: str,
    settings: Settings,
    doubted: frozenset[str],
) -> Finding:
    """Votes until more cannot change the majority; one is enough where nothing speaks against it.

    Which order of letters comes first hangs on the statement, or a critic that always says one
    letter would be believed.
    """
    first = int(sha256_of_json(statement.text)[:8], 16)
    is_doubted = any(repr(statement.text)[1:-1][:60] in evidence for evidence in doubted)
    opinions: list[Opinion] = []
    for vote in range(settings.num_votes):
        opinion = await asked(asker, other, statement, first + vote)
        if opinion is not None:
            opinions.append(opinion)
        num_for = sum(each.label is Support.SUPPORTED for each in opinions)
        num_against = len(opinions) - num_for
        if num_for == len(opinions) > int(is_doubted):
            break
        if max(num_for, num_against) > settings.num_votes // 2:
            break
    return _of_votes(statement, side, opinions, vote + 1)


def _of_votes(statement: Statement, side: Side, opinions: list[Opinion], num_votes: int) -> Finding:
    if not opinions:
        return Finding(statement.text, side, None, 0.0, num_votes)
    labels = [each.label for each in opinions]
    is_supported = labels.count(Support.SUPPORTED) * 2 > len(labels)
    against = Support.CONTRADICTED if Support.CONTRADICTED in labels else Support.ABSENT
    label = Support.SUPPORTED if is_supported else against
    mean = sum(each.support for each in opinions) / len(opinions)
    return Finding(statement.text, side, label, mean, num_votes)


def _decided(findings: tuple[Finding, ...], settings: Settings) -> tuple[Verdict, str]:
    for finding in findings:
        is_weak = finding.support < settings.least_support
        if finding.label not in (Support.SUPPORTED, None) or (finding.label and is_weak):
            return Verdict.UNFAITHFUL, finding.sentence()
    for finding in findings:
        if finding.label is None:
            return Verdict.UNVERIFIED, finding.sentence()
    sides = {finding.side for finding in findings}
    if missing := {"rewrite", "source"} - sides:
        return Verdict.UNFAITHFUL, f"the {missing.pop()} states nothing"
    return Verdict.FAITHFUL, f"all {len(findings)} statements are supported, both ways"
