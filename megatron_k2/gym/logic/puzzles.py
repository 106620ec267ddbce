"""Checkers and generators of the report's puzzles: 24, sudoku, cryptarithms.

A checker accepts whatever solves the puzzle, not the solution that made it. Expressions are read by
Python's parser and added up by hand: nothing of an answer is evaluated.
"""

import ast
import random
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from megatron_k2.gym.mathematics.final_answer import last_boxed

LONGEST_EXPRESSION = 200
type Found = dict[str, Any]


def found(is_right: bool, evidence: str) -> Found:
    """A verdict, as JSON."""
    return {"outcome": "right" if is_right else "wrong", "evidence": evidence}


def committed(answer: str) -> str:
    r"""What an answer commits to: its last ``\boxed{…}``, else its last line that is not blank."""
    boxed = last_boxed(answer)
    if boxed is not None:
        return boxed.strip()
    return next((x.strip() for x in reversed(answer.splitlines()) if x.strip()), "")


def value_of(expression: str) -> tuple[Fraction, Counter[int]]:
    """Value of an expression of + - * / and whole numbers, and the numbers it uses.

    Raises:
        ValueError: anything else in it, or a division by zero.
    """
    if len(expression) > LONGEST_EXPRESSION:
        raise ValueError(f"longer than {LONGEST_EXPRESSION} characters")
    text = expression.replace("×", "*").replace("÷", "/").replace(r"\times", "*")
    try:
        tree = ast.parse(text.replace(r"\div", "/").strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError("it is not an expression") from None
    used: Counter[int] = Counter()
    return _value(tree.body, used), used


def _value(node: ast.expr, used: Counter[int]) -> Fraction:
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            used[number] += 1
            return Fraction(number)
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _value(left, used), _value(right, used)
            match op:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.Div() if b:
                    return a / b
    raise ValueError("only + - * / and whole numbers, no division by zero")


def check_24(numbers: list[int], target: int, answer: str) -> Found:
    """An expression of exactly the given numbers that makes the target."""
    expression = committed(answer).split("=")[0].strip("$ .")
    try:
        value, used = value_of(expression)
    except ValueError as problem:
        return found(False, f"{expression[:80]!r}: {problem}")
    if used != Counter(numbers):
        return found(False, f"it uses {sorted(used.elements())}, not {sorted(numbers)}")
    return found(value == target, f"{expression} = {value}")


def check_sudoku(puzzle: str, answer: str) -> Found:
    """A filled grid: rows, columns and boxes each have every digit, the clues stand."""
    size = int(len(puzzle) ** 0.5)
    box = int(size**0.5)
    # Only a grid counts: the last rows of digits, one line each.
    rows = [re.sub(r"[\s|,]", "", line) for line in answer.splitlines()]
    rows = [row for row in rows if re.fullmatch(rf"[1-{size}]{{{size}}}", row)][-size:]
    if len(rows) != size:
        return found(False, f"no grid of {size} rows of {size} digits")
    grid = "".join(rows)
    if any(clue not in (".", cell) for clue, cell in zip(puzzle, grid, strict=True)):
        return found(False, "a clue was changed")
    span = range(size)
    units = [[(r, c) for c in span] for r in span] + [[(r, c) for r in span] for c in span]
    units += [
        [(r + i, c + j) for i in range(box) for j in range(box)]
        for r in range(0, size, box)
        for c in range(0, size, box)
    ]
    for unit in units:
        if len({grid[r * size + c] for r, c in unit}) != size:
            return found(False, f"a digit stands twice among rows and columns {unit}")
    return found(True, "all rows, columns and boxes hold every digit")


def check_cryptarithm(words: list[str], total: str, answer: str) -> Found:
    """One digit a letter, no two alike, none of a first letter 0, and the sum holds."""
    text = committed(answer)
    pairs = re.findall(r"\b([A-Z])\s*=\s*(\d)\b", text)
    letters = set("".join(words) + total)
    given = dict(pairs)
    if set(given) != letters or len(pairs) != len(given):
        return found(False, f"expected one digit each of {''.join(sorted(letters))}")
    if len(set(given.values())) != len(letters):
        return found(False, "two letters have one digit")
    if any(given[word[0]] == "0" for word in [*words, total]):
        return found(False, "a number begins with 0")
    values = [int("".join(given[letter] for letter in word)) for word in [*words, total]]
    is_right = sum(values[:-1]) == values[-1]
    relation = "=" if is_right else "is not"
    return found(is_right, f"{' + '.join(map(str, values[:-1]))} {relation} {values[-1]}")


CHECKS: dict[str, Callable[..., Found]] = {
    "24": check_24,
    "sudoku": check_sudoku,
    "cryptarithm": check_cryptarithm,
}


def make_24(order: random.Random) -> tuple[str, dict[str, Any], str]:
    """Four numbers and an expression of them, from the expression down."""
    while True:
        terms = [str(order.randint(1, 13)) for _ in range(4)]
        numbers = [int(term) for term in terms]
        while len(terms) > 1:
            left = terms.pop(order.randrange(len(terms)))
            right = terms.pop(order.randrange(len(terms)))
            terms.append(f"({left} {order.choice('+-*/')} {right})")
        try:
            value, _ = value_of(terms[0])
        except ValueError:
            continue
        if value.denominator == 1 and 10 <= value <= 100:
            facts = {"numbers": numbers, "target": int(value)}
            asked = f"Use each of {numbers} once, with + - * / and brackets, to make {value}."
            return f"{asked} Put the expression in \\boxed{{}}.", facts, f"\\boxed{{{terms[0]}}}"


def make_sudoku(order: random.Random) -> tuple[str, dict[str, Any], str]:
    """A 4 x 4 or 9 x 9 grid, shuffled from a regular one, with cells taken out."""
    box = order.choice((2, 3))
    size = box * box
    digits = order.sample(range(1, size + 1), size)
    rows, columns = ([b * box + i for b in order.sample(range(box), box)
                      for i in order.sample(range(box), box)] for _ in range(2))  # fmt: skip
    grid = [[digits[(box * (r % box) + r // box + c) % size] for c in columns] for r in rows]
    cells = "".join(str(cell) for row in grid for cell in row)
    shown = "".join(cell if order.random() < 0.55 else "." for cell in cells)
    lines = "\n".join(shown[i : i + size] for i in range(0, size * size, size))
    solution = "\n".join(cells[i : i + size] for i in range(0, size * size, size))
    asked = f"Fill the {size} x {size} sudoku (boxes of {box} x {box}). Answer with the grid alone."
    return f"{asked}\n{lines}", {"puzzle": shown}, solution


def make_cryptarithm(order: random.Random) -> tuple[str, dict[str, Any], str]:
    """Two numbers and their sum, digits hidden behind letters."""
    a, b = order.randint(100, 9999), order.randint(100, 9999)
    letters = dict(zip("0123456789", order.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 10), strict=True))
    words = ["".join(letters[digit] for digit in str(number)) for number in (a, b, a + b)]
    used = sorted({(letters[digit], digit) for number in (a, b, a + b) for digit in str(number)})
    asked = (
        f"{words[0]} + {words[1]} = {words[2]}. Each letter is a digit, no number begins with 0."
    )
    facts = {"words": words[:2], "total": words[2]}
    solution = ", ".join(f"{letter}={digit}" for letter, digit in used)
    return f"{asked} Answer in one line, as A=1, B=2, ...", facts, solution


MAKERS = {"24": make_24, "sudoku": make_sudoku, "cryptarithm": make_cryptarithm}
