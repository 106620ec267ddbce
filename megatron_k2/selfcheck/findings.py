"""What a step hands back: a verdict, a sentence, figures, rates for the planner."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["pass", "FAIL", "skip", "time"]
"""``time``: the step was ended at its limit; what it had not said is not known."""


@dataclass(frozen=True)
class Figure:
    """One measured number."""

    name: str
    value: float
    unit: str = ""
    bar: float | None = None
    """What it must stay under; ``None`` where it is only reported."""
    beside: float | None = None
    """What it is to be compared with: a prediction, a peak, another implementation."""
    beside_what: str = ""

    @property
    def is_met(self) -> bool:
        """Whether it is under its bar; a number that is not finite is under none."""
        return self.bar is None or self.value <= self.bar


@dataclass(frozen=True)
class Findings:
    """A step's result."""

    verdict: Verdict
    note: str = ""
    """One sentence: what was seen, or why nothing was."""
    figures: tuple[Figure, ...] = ()
    rates: dict[str, Any] = field(default_factory=dict)
    """Fields of ``planning.measured_rates.Rates`` that the step measured."""

    def to_json(self) -> dict[str, Any]:
        """For the record, and for the way from the step's process."""
        return asdict(self)

    @staticmethod
    def from_json(found: dict[str, Any]) -> "Findings":
        """The inverse of ``to_json``."""
        figures = tuple(Figure(**figure) for figure in found["figures"])
        return Findings(found["verdict"], found["note"], figures, found["rates"])


def judged(note: str, figures: list[Figure], rates: dict[str, Any] | None = None) -> Findings:
    """``pass`` if every figure is under its bar."""
    missed = [figure for figure in figures if not figure.is_met]
    if missed:
        worst = missed[0]
        note = f"{worst.name} is {worst.value:.3g}, must be at most {worst.bar:.3g}; {note}"
    return Findings("FAIL" if missed else "pass", note, tuple(figures), rates or {})
