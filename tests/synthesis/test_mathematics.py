"""Mathematics that is rewritten or translated: what survives passes, what is changed is named."""

import asyncio

import pytest

from megatron_k2.synthesis.rephrase.language import language_of
from megatron_k2.synthesis.rephrase.mathematics import MathematicsChecker, formulae

pytest.importorskip("math_verify")

SOURCE = (
    "Solve $x^2 - 5x + 6 = 0$. The sum of the roots is 5 and their product is 6, so we factor: "
    "$(x-2)(x-3) = 0$.\n\n```py\nroots = [2, 3]\n```\n\nThe answer is $\\{2, 3\\}$."
)
NOTE = (
    "**Given** the equation $x^{2}-5x+6=0$.\n1. The roots add up to 5 and multiply to 6.\n"
    "2. Hence \\((x-2)(x-3)=0\\).\n\n```py\nroots = [2, 3]\n```\n\nThe answer is $\\{3, 2\\}$."
)
WAGES = "A worker earns $12$ crowns an hour for 7 hours. The answer is 84."
STEPS = (
    "Step 1: the wage is $12$ crowns for each of 7 hours. Step 2: 12 * 7 = 84. The answer is 84."
)
GERMAN = (
    "Der Kreis hat den Radius $r = 3$. Die Fläche ist gleich 28,27 und der Umfang ist 18,85, denn "
    "wir rechnen mit 3,14159 und nicht mit einem Bruch. Die Höhe der Säule ist 1.250 mm."
)
ENGLISH = (
    "The circle has the radius $r = 3$. The area is 28.27 and the circumference is 18.85, since we "
    "calculate with 3.14159 and not with a fraction. The column is 1,250 mm high."
)


@pytest.fixture(scope="module")
def checker():
    found = MathematicsChecker()
    yield found
    asyncio.run(found.close())


def problem(source, rewrite, language="en"):
    async def ask():
        checker = MathematicsChecker()
        try:
            return await checker.problem(source, rewrite, language)
        finally:
            await checker.close()

    return asyncio.run(ask())


def test_a_note_that_keeps_everything_passes():
    assert problem(SOURCE, NOTE) is None
    assert problem(SOURCE, SOURCE) is None


@pytest.mark.parametrize(
    ("old", "new", "seen"),
    [
        ("5x", "6x", "formula is lost"),
        ("(x-2)(x-3)=0", "(x-2)(x+3)=0", "formula is lost"),
        ("roots = [2, 3]", "roots = [3, 2]", "code"),
        ("add up to 5", "add up to a number", "the number 5 is lost"),
        ("multiply to 6", "multiply to 6 out of 40", "the number 40 is not in the source"),
        ("\\{3, 2\\}", "\\{3, 4\\}", "formula is lost"),
    ],
    ids=["a coefficient", "a sign", "code", "a number lost", "a number new", "the answer"],
)
def test_what_is_changed_is_named(old, new, seen):
    assert old in NOTE
    assert seen in problem(SOURCE, NOTE.replace(old, new))


def test_another_answer_is_named_where_no_formula_holds_it():
    assert "final answer" in problem(
        WAGES, WAGES.replace("The answer is 84", "It is not 84. The answer is 12")
    )


def test_steps_may_show_what_true_arithmetic_makes_of_known_numbers():
    shown = WAGES.replace(" The answer", " For two days it is 7 + 7 = 14 hours. The answer")
    assert problem(WAGES, STEPS) is None
    assert problem(WAGES, shown) is None
    assert "15 is not in" in problem(WAGES, shown.replace("= 14", "= 15"))
    assert "14 is not in" in problem(WAGES, shown.replace("7 + 7 = 14", "14"))


def test_a_formula_in_another_form_is_equal_by_algebra():
    source, other = "We get $(x+1)^2$ there.", "We get $x^2+2x+1$ there."
    assert problem(source, other) is None
    assert "formula is lost" in problem(source, other.replace("2x", "3x"))


def test_a_translation_keeps_numbers_as_its_language_writes_them():
    assert language_of(GERMAN) == "de"
    assert problem(GERMAN, ENGLISH, "de") is None
    assert "lost" in problem(GERMAN, ENGLISH.replace("28.27", "28.72"), "de")
    assert problem(GERMAN, ENGLISH, "en") is not None, "a comma that is read as English"


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (ENGLISH, "en"),
        ("La somme des racines est égale à cinq, et leur produit est six dans ce cas.", "fr"),
        ("La suma de las raíces es igual a cinco y el producto es seis en este caso.", "es"),
        ("Сумма корней равна пяти.", "ru"),
        ("方程的根之和为五。", "zh"),
        ("根の和は五である。", "ja"),
        ("$x^2 = 4$", None),
    ],
)
def test_languages_are_told(text, language):
    assert language_of(text) == language


def test_formulae_are_found_in_every_mark_and_prices_are_none():
    text = r"$a+b$, \(c\), \[d = e\] and $$f$$; it costs 5$ or 6$ a day"
    assert formulae(text) == ["a+b", "c", "d=e", "f"]
