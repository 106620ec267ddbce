"""Whether a text's final answer equals a reference: numbers exactly, all else by algebra.

Called in a worker process (``gym/workers.py``), which ends it when it is late: math-verify's own
alarms do not work outside a main thread, and are turned off.
"""

import re
from fractions import Fraction
from typing import Any

from megatron_k2.gym.mathematics.final_answer import final_answer, stripped
from megatron_k2.gym.mathematics.numbers import UNITS, Quantity, plain, quantity

CHOICE = re.compile(r"\(?([A-J])\)?")
"""Of several answers, by its letter."""
DEGREES = UNITS["°"][1]
LEAST_DECIMALS = 3
"""Of an answer that stands for a value it only rounds: 0.333 for 1/3, but not 0.3."""


def check(reference: str, answer: str) -> dict[str, Any]:
    """The verdict as JSON: ``outcome`` and ``evidence``.

    Raises:
        ModuleNotFoundError: algebra is needed and math-verify is not installed.
    """
    found = final_answer(answer)
    if found is None:
        return {"outcome": "wrong", "evidence": "no final answer was found"}
    gold = stripped(reference)
    is_equal = are_equal(gold, found)
    relation = "=" if is_equal else "is not"
    return {
        "outcome": "right" if is_equal else "wrong",
        "evidence": f"{found[:200]} {relation} {gold[:200]}",
    }


def are_equal(gold: str, found: str) -> bool:
    """Two expressions without marks around them."""
    if _letters(gold) == _letters(found):
        return True
    choices = CHOICE.fullmatch(_letters(gold)), CHOICE.fullmatch(_letters(found))
    if choices[0] and choices[1]:
        return choices[0][1] == choices[1][1]
    left, right = quantity(gold), quantity(_right_hand_side(gold, found))
    if left and right:
        return are_same_quantity(left, right)
    return _by_algebra(gold, found)


def are_same_quantity(gold: Quantity, found: Quantity) -> bool:
    """Equal values; a unit that one does not write is the other's."""
    if gold.is_percent != found.is_percent and not (gold.dimension or found.dimension):
        # "What percent" is asked and answered with and without the sign.
        is_asked_in_percent = gold.is_percent or abs(gold.number) >= 1
        same_number = gold.number == found.number and is_asked_in_percent
        return same_number or _is_near(gold.value, found)
    if gold.dimension is None or found.dimension is None:
        return _is_near(gold.number, Quantity(found.number, None, found.number, found.num_decimals))
    return gold.dimension == found.dimension and (
        gold.value == found.value or (gold.value != 0 and _is_scaled(gold, found))
    )


def _is_near(gold: Fraction, found: Quantity) -> bool:
    """Equal, or the reference rounded to the decimals that the answer writes."""
    if gold == found.value:
        return True
    if found.num_decimals < LEAST_DECIMALS or _is_short_decimal(gold):
        return False
    return abs(gold - found.value) * 2 * 10**found.num_decimals <= 1


def _is_scaled(gold: Quantity, found: Quantity) -> bool:
    factor = found.value / found.number if found.number else Fraction(1)
    return _is_near(
        gold.value / factor, Quantity(found.number, None, found.number, found.num_decimals)
    )


def _is_short_decimal(value: Fraction) -> bool:
    """Whether it can be written without rounding: then it must be."""
    below = value.denominator
    for prime in (2, 5):
        while below % prime == 0:
            below //= prime
    return below == 1


def _right_hand_side(gold: str, found: str) -> str:
    """What stands after ``x =`` in an answer, where the reference has no such thing."""
    name, sign, value = found.partition("=")
    is_name = sign and "=" not in gold and len(name.strip()) <= 12 and "=" not in value
    return value.strip() if is_name else found


def _letters(text: str) -> str:
    return plain(text).replace(" ", "")


def _by_algebra(gold: str, found: str) -> bool:
    from math_verify import parse, verify

    if r"\pi" in gold + found:
        gold, found = _in_radians(gold), _in_radians(found)
    # One expression each, marked as such: math-verify would else look for others in the text.
    left = parse(f"${gold}$", parsing_timeout=None)
    right = parse(f"${found}$", parsing_timeout=None)
    if not left:
        raise ValueError(f"the reference {gold[:80]!r} cannot be read")
    if not right:
        return False
    return bool(verify(left, right, timeout_seconds=None)) or _is_rounded(left[0], found)


def _in_radians(text: str) -> str:
    """Degrees as a multiple of pi; anything else as it is."""
    angle = quantity(text)
    if angle is None or angle.dimension != DEGREES:
        return text
    return rf"\frac{{{angle.value.numerator}\pi}}{{{angle.value.denominator * 180}}}"


def _is_rounded(gold: Any, found: str) -> bool:
    """Whether a decimal answer is a closed form's value, rounded to the decimals it writes."""
    import sympy

    number = quantity(found)
    if number is None or number.num_decimals < LEAST_DECIMALS or number.dimension:
        return False
    if not isinstance(gold, sympy.Expr) or gold.free_symbols or not gold.is_real:
        return False
    places = number.num_decimals
    value = sympy.Rational(number.number.numerator, number.number.denominator)
    return bool(abs(sympy.N(gold, places + 20) - value) * 2 * 10**places <= 1)
