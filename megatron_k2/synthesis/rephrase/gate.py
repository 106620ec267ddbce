"""The gate: what a finished rewrite must pass, stage by stage, each refusal with its reason."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_k2.fidelity.advisory import score
from megatron_k2.fidelity.check import Settings, Verdict, check
from megatron_k2.fidelity.statements import Asker
from megatron_k2.synthesis.rephrase.mathematics import MathematicsChecker
from megatron_k2.synthesis.rephrase.pieces import Piece
from megatron_k2.synthesis.rephrase.rewrite import Pair
from megatron_k2.synthesis.rephrase.screen import is_abusive, new_control_names, personal_data

_BEFORE_LETTERS = 4000
"""Of the source before a piece that its statements are held against: about 1,000 tokens; ours."""


@dataclass(frozen=True)
class Judged:
    """What the gate says."""

    verdict: Verdict
    stage: str
    """Where it was decided: ``personal data``, ``mathematics``, ``fidelity`` and others."""
    reason: str
    scores: Mapping[str, float]
    signals: Mapping[str, int] = field(default_factory=dict)
    """How often each surface signal was seen."""
    num_questions: int = 0


@dataclass(frozen=True)
class Gate:
    """What judges."""

    asker: Asker | None
    """The model that checks; without one nothing is faithful."""
    settings: Settings
    mathematics: MathematicsChecker | None = None
    """Of documents of mathematics."""

    async def source_problem(
        self, text: str, excerpts: Sequence[Sequence[Piece]]
    ) -> tuple[str, str] | None:
        """Stage and reason for which a document is not rewritten at all.

        Where no vote on abuse could be read the document goes on: what stands in it is then for the
        check of its statements alone.
        """
        if (kind := personal_data(text)) is not None:
            return "personal data", f"the source has {kind}"
        if self.asker is not None:
            for pieces in excerpts:
                if await is_abusive(self.asker, "".join(piece.text for piece in pieces)):
                    return "abuse", "the model that checks finds abuse or threats in the source"
        return None

    async def judge(
        self, source: str, rewrite: str, pairs: Sequence[Pair], language: str | None
    ) -> Judged:
        """The verdict on a document's rewrite."""
        advisory = {"advisory": round(score(source, rewrite), 4)}
        if (problem := _form_problem(source, rewrite)) is not None:
            return Judged(Verdict.UNFAITHFUL, *problem, advisory)
        if self.mathematics is not None:
            lost = await self.mathematics.problem(source, rewrite, language)
            if lost is not None:
                return Judged(Verdict.UNFAITHFUL, "mathematics", lost, advisory)
        return await self._fidelity(pairs, advisory)

    async def _fidelity(self, pairs: Sequence[Pair], advisory: dict[str, float]) -> Judged:
        """Piece by piece; the first that is not faithful decides."""
        signals: dict[str, int] = {}
        least: float | None = None
        num_questions, unverified = 0, ""
        for pair in pairs:
            if pair.piece.is_copied:
                continue
            before = pair.before[-_BEFORE_LETTERS:]
            found = await check(pair.piece.text, pair.rewrite, self.asker, self.settings, before)
            num_questions += found.num_questions
            for signal in (*found.gates, *found.advice):
                signals[signal.name] = signals.get(signal.name, 0) + 1
            if found.score is not None:
                least = found.score if least is None else min(least, found.score)
            scores = advisory if least is None else {**advisory, "fidelity": round(least, 4)}
            if found.verdict is Verdict.UNFAITHFUL:
                reason = found.reason
                return Judged(found.verdict, "fidelity", reason, scores, signals, num_questions)
            if found.verdict is Verdict.UNVERIFIED:
                unverified = unverified or found.reason
        verdict = Verdict.UNVERIFIED if unverified or least is None else Verdict.FAITHFUL
        reason = unverified or f"every statement of {len(pairs)} pieces is supported, both ways"
        scores = advisory if least is None else {**advisory, "fidelity": round(least, 4)}
        return Judged(verdict, "fidelity", reason, scores, signals, num_questions)

    async def close(self) -> None:
        """End what it started."""
        if self.mathematics is not None:
            await self.mathematics.close()
        if self.asker is not None:
            await self.asker.close()


def _form_problem(source: str, rewrite: str) -> tuple[str, str] | None:
    if names := new_control_names(source, rewrite):
        return "control tokens", f"{names[0]!r} is in the rewrite and not in the source"
    if (kind := personal_data(rewrite)) is not None:
        return "personal data", f"the rewrite has {kind}"
    return None


def lineage_part(judged: Judged) -> dict[str, Any]:
    """What a record says of the verdict."""
    return {
        "verdict": str(judged.verdict),
        "stage": judged.stage,
        "reason": judged.reason,
        "scores": dict(judged.scores),
        "signals": dict(judged.signals),
    }
