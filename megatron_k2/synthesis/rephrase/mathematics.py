"""Whether mathematics survived: formulae, numbers, the final answer, code.

Formulae are compared as text without what typesetting alone needs, then by algebra in a worker
process with a deadline. A learning note may show steps, so a number that the source has not is
allowed where it is what true arithmetic makes of known ones.
"""

import ast
import re
from collections.abc import Iterator
from fractions import Fraction

from megatron_k2.fidelity.quantities import quantities, shown
from megatron_k2.gym.checked import CheckedDomain
from megatron_k2.gym.mathematics.env import NAME, mathematics
from megatron_k2.gym.mathematics.final_answer import final_answer
from megatron_k2.gym.protocol import Outcome, Task
from megatron_k2.synthesis.rephrase.language import COMMA_IS_POINT

_FORMULA = re.compile(
    r"\$\$(?P<a>.+?)\$\$|\\\[(?P<b>.+?)\\\]|\\\((?P<c>.+?)\\\)|(?<![\\\d])\$(?P<d>[^$\n]{1,400}?)\$",
    re.DOTALL,
)
_TYPESETTING = re.compile(
    r"\\(?:left|right|,|;|!|:|quad|qquad|displaystyle|textstyle|[Bb]igg?)\b|\s"
)
_FENCE = re.compile(r"^(`{3,}|~{3,})[^\n]*\n.*?^\1[^\n]*$", re.MULTILINE | re.DOTALL)
_NUMBERING = re.compile(
    r"(?m)^[ \t]*(?:\d{1,3}[.)]|[-*])[ \t]|\b(?:[Ss]tep|[Cc]ase|[Pp]art)\s+\d{1,3}\b"
)
_ARITHMETIC = re.compile(
    r"(?P<left>[-+*/×·÷^().\d\s]*\d[-+*/×·÷^().\d\s]*)=(?P<right>\s*-?\d+(?:\.\d+)?)"
)
_FOREIGN_NUMBER = re.compile(r"(?<![\w.,])\d+(?:[.\u00a0\u202f ]\d{3})*(?:,\d+)?(?![\w])")
_RELATION = re.compile(r"(<=|>=|=|<|>|\\(?:leq?|geq?|neq?|approx|equiv|sim|in|subset)(?![a-z]))")
_VARIABLE = re.compile(r"[A-Za-z]{1,2}")
_MOST_CANDIDATES = 8
"""Formulae of a rewrite that one of its source's is compared with by algebra."""


def formulae(text: str) -> list[str]:
    """What stands between marks of mathematics, without what typesetting alone needs."""
    found = (next(part for part in match.groups() if part) for match in _FORMULA.finditer(text))
    return list(dict.fromkeys(_normal(each) for each in found))


def _normal(formula: str) -> str:
    plain = _TYPESETTING.sub("", formula.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac"))
    return re.sub(r"([\^_])\{(\w)\}", r"\1\2", plain).rstrip(".,;")


class MathematicsChecker:
    """Compares; algebra runs in processes of its own, which ``close`` ends.

    Args:
        num_workers: of these processes.
    """

    def __init__(self, num_workers: int = 1) -> None:
        self._domain: CheckedDomain = mathematics(num_workers)

    async def problem(self, source: str, rewrite: str, language: str | None = "en") -> str | None:
        """What was lost or made up; ``None`` where nothing was.

        Args:
            source: as it was.
            rewrite: a learning note or a translation of it.
            language: of the source, by which its numbers are read.
        """
        for fence in (match[0] for match in _FENCE.finditer(source)):
            if fence not in rewrite:
                return f"a block of code is not as it was: {fence[:60]!r}"
        return (
            await self._lost_formula(source, rewrite)
            or _numbers(source, rewrite, language)
            or await self._other_answer(source, rewrite)
        )

    async def _lost_formula(self, source: str, rewrite: str) -> str | None:
        here = formulae(rewrite)
        everything = _TYPESETTING.sub("", rewrite).replace(r"\dfrac", r"\frac")
        new = [each for each in here if each not in formulae(source)][:_MOST_CANDIDATES]
        for formula in formulae(source):
            if _VARIABLE.fullmatch(formula) or formula in here or formula in everything:
                continue
            if not await self._is_equal_to_one(formula, new):
                return f"a formula is lost: {formula[:80]!r}"
        return None

    async def _is_equal_to_one(self, formula: str, candidates: list[str]) -> bool:
        for candidate in candidates:
            if await self._are_equal(formula, candidate):
                return True
        return False

    async def _other_answer(self, source: str, rewrite: str) -> str | None:
        answer = final_answer(source)
        if answer is None:
            return None
        found = final_answer(rewrite)
        if found is not None and await self._are_equal(answer, found):
            return None
        if found is None and _normal(answer) in _TYPESETTING.sub("", rewrite):
            return None
        return f"the final answer {answer[:60]!r} is {str(found)[:60]!r} in the rewrite"

    async def _are_equal(self, gold: str, found: str) -> bool:
        """Side by side: of two equations, algebra alone compares what is right of the sign."""
        left, right = _RELATION.split(gold), _RELATION.split(found)
        if len(left) != len(right) or left[1::2] != right[1::2]:
            return False
        for a, b in zip(left[::2], right[::2], strict=True):
            if _normal(a) != _normal(b) and not await self._is_same(a, b):
                return False
        return True

    async def _is_same(self, gold: str, found: str) -> bool:
        verdict = await self._domain.judge(
            Task(NAME, "", {"reference": gold}), f"\\boxed{{{found}}}"
        )
        return verdict.outcome is Outcome.RIGHT

    async def close(self) -> None:
        """End the processes."""
        await self._domain.close()


def _numbers(source: str, rewrite: str, language: str | None) -> str | None:
    there, here = _values(source, language), _values(_NUMBERING.sub(" ", rewrite), "en")
    known = there | set(_of_words(source))
    for value in sorted(there - here - set(_of_words(rewrite))):
        return f"the number {shown(value)} is lost"
    unknown = here - known
    steps = list(_true_arithmetic(rewrite))
    while unknown:
        made = {right for left, right in steps if left <= known and right in unknown}
        if not made:
            return f"the number {shown(min(unknown))} is not in the source"
        known, unknown = known | made, unknown - made
    return None


def _values(text: str, language: str | None) -> set[Fraction]:
    """Numbers in digits; *3,14* where that is how the language writes them."""
    plain = _NUMBERING.sub(" ", text)
    if language in COMMA_IS_POINT:
        plain = _FOREIGN_NUMBER.sub(_as_english, plain)
    found = set()
    for each in quantities(plain):
        if (
            isinstance(each.value, Fraction)
            and plain[each.start : each.end][-1:]
            and any(letter.isdigit() for letter in plain[each.start : each.end])
        ):
            found.add(abs(each.value))
    return found


def _as_english(match: re.Match[str]) -> str:
    return re.sub(r"[.\u00a0\u202f ]", "", match[0]).replace(",", ".")


def _of_words(text: str) -> Iterator[Fraction]:
    for each in quantities(text):
        if isinstance(each.value, Fraction):
            yield abs(each.value)


def _true_arithmetic(text: str) -> Iterator[tuple[set[Fraction], Fraction]]:
    """Numbers on the left of each equality that holds, and the one on its right."""
    plain = re.sub(r"\\(?:times|cdot)\b", "*", text).replace(r"\div", "/")
    for match in _ARITHMETIC.finditer(plain):
        left = re.sub(r"[×·]", "*", match["left"]).replace("÷", "/").replace("^", "**").strip()
        right = Fraction(match["right"].strip())
        try:
            value = _evaluated(ast.parse(left, mode="eval").body)
        except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
            continue
        if value == right:
            yield {abs(Fraction(each)) for each in re.findall(r"\d+(?:\.\d+)?", left)}, abs(right)


def _evaluated(node: ast.AST) -> Fraction:
    """A sum, product, quotient or small power of numbers.

    Raises:
        ValueError: it is anything else.
    """
    match node:
        case ast.Constant(value=int() | float() as value):
            return Fraction(str(value))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluated(operand)
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _evaluated(left), _evaluated(right)
            match op:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.Div():
                    return a / b
                case ast.Pow() if b.denominator == 1 and abs(b) <= 20 and abs(a) < 10**6:
                    return a ** int(b)
    raise ValueError("no arithmetic")
