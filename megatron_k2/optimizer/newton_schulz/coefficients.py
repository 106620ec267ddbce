"""The polynomials of Newton-Schulz: published sets, each with its source."""

from dataclasses import dataclass
from typing import Literal

Step = tuple[float, float, float]
"""(a, b, c) of ``aX + bX³ + cX⁵``."""


@dataclass(frozen=True)
class CoefficientSet:
    """One published choice of the polynomials ``aX + bX³ + cX⁵``, a step each."""

    name: str
    source: str
    per_step: tuple[Step, ...]
    """(a, b, c) in order of application."""
    default_steps: int
    """Number of steps that its source runs."""
    extension: Literal["cycle", "repeat_last"]
    """What step ``len(per_step)`` and later use: the first again, or the last for ever."""

    def take(self, steps: int | None = None) -> tuple[Step, ...]:
        """The first ``steps`` polynomials, ``default_steps`` if None; fewer cuts the list."""
        steps = self.default_steps if steps is None else steps
        if steps < 1:
            raise ValueError(f"steps={steps}: expected at least 1; {self.default_steps} is usual")
        last = len(self.per_step) - 1
        if self.extension == "cycle":
            return tuple(self.per_step[i % (last + 1)] for i in range(steps))
        return tuple(self.per_step[min(i, last)] for i in range(steps))


_JORDAN: Step = (3.4445, -4.7750, 2.0315)

COEFFICIENTS: dict[str, CoefficientSet] = {
    row.name: row
    for row in (
        CoefficientSet(
            name="jordan",
            source="Keller Jordan, Muon (2024); Moonlight, arXiv:2502.16982, section 2.1",
            per_step=(_JORDAN,),
            default_steps=5,
            extension="cycle",
        ),
        CoefficientSet(
            name="quintic",
            source="F. L. Cesista and others, muon-opt-coeffs (2025), by way of modded-nanogpt; "
            "Megatron-Core's default",
            per_step=(
                (4.0848, -6.8946, 2.9270),
                (3.9505, -6.3029, 2.6377),
                (3.7418, -5.5913, 2.3037),
                (2.8769, -3.1427, 1.2046),
                (2.8366, -3.0525, 1.2012),
            ),
            default_steps=5,
            extension="cycle",
        ),
        CoefficientSet(
            name="polar_express",
            source="Polar Express, arXiv:2505.16932, its safety factor 1.01 folded into all but "
            "the last polynomial, to four digits as in Emerging-Optimizers",
            per_step=(
                (8.2051, -22.9019, 16.4607),
                (4.0664, -2.8612, 0.5184),
                (3.9096, -2.8234, 0.5250),
                (3.2856, -2.4153, 0.4853),
                (2.2779, -1.6198, 0.3985),
                (1.8726, -1.2307, 0.3585),
                (1.8564, -1.2132, 0.3568),
                (1.8750, -1.2500, 0.3750),
            ),
            default_steps=5,
            extension="repeat_last",
        ),
        CoefficientSet(
            name="deepseek_v4",
            source="DeepSeek-V4 report, section 2.4: eight fast steps, then two that pin the "
            "singular values at 1",
            per_step=(_JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2,
            default_steps=10,
            extension="repeat_last",
        ),
    )
}


def coefficient_set(name: str) -> CoefficientSet:
    """The published set of polynomials called ``name``.

    Raises:
        ValueError: naming the sets there are.
    """
    if name not in COEFFICIENTS:
        raise ValueError(f"coefficients={name!r}: expected one of {', '.join(COEFFICIENTS)}")
    return COEFFICIENTS[name]
