"""Sentences that add up to their text, and numbers that are one however they are written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_k2.fidelity.quantities import quantities, shown, values
from megatron_k2.fidelity.sentences import content, sentences
from megatron_k2.fidelity.surface import Surface, names, roles_swapped

PARTS = st.sampled_from(
    [
        "Dr. Ames",
        " went. ",
        "Then 3.5 km",
        "! ",
        "\n\n",
        "\n- item",
        "```\na. B\n```\n",
        "他来了。",
        "?",
        " A ",
        "x",
    ]
)


@given(st.lists(PARTS, max_size=30).map("".join) | st.text(max_size=200))
def test_the_pieces_are_the_text(text):
    assert "".join(sentences(text)) == text
    assert all(piece.strip() for piece in sentences(text)) or not text.strip()


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Dr. Smith met J. R. Ott at 3.5 p.m. in St. Ives. He left.", 2),
        ('He said "Go!" Then he left. Why? Nobody knows…', 4),
        ("One.\n\n- two\n- three\n", 3),
        ("Q: What?\nA: This.\nQ: Why?\n", 3),
        ("Before:\n```python\na = 1. \nB. C\n```\nAfter. End.", 4),
        ("他来了。她走了！", 2),
        ("Version 2.7 ended. It was e.g. slow.", 2),
    ],
)
def test_where_sentences_end(text, number):
    assert len(sentences(text)) == number


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,850 km", "eighteen hundred and fifty km"),
        ("1.85 thousand", "1\u202f850"),
        ("the 3rd", "the third"),
        ("in 1984", "in nineteen eighty-four"),
        ("2,300,000", "two million three hundred thousand"),
        ("50%", "fifty percent"),
        ("12 eggs", "a dozen eggs"),
        ("21 and 7", "twenty-one and seven"),
        ("32,500", "thirty-two thousand five hundred"),
        ("7, 8, 9", "seven, eight and nine"),
        ("the 1960s", "nineteen sixty"),
    ],
)
def test_a_number_is_one_however_it_is_written(one, other):
    assert values(one) == values(other)


def test_what_is_another_number():
    assert values("2,850") != values("2,580")
    assert values("-5 degrees") != values("5 degrees")
    assert {shown(value) for value in values("Python 3.12.1 and 2.7")} == {"3.12.1", "2.7"}
    assert all(each.is_idle for each in quantities("one of the two"))
    assert not any(each.is_idle for each in quantities("1 of 2"))


def test_names_are_not_labels_nor_first_words():
    assert names("Heating is dear. The Oster family pays.\nMira: Do they?\nNATO does.") == [
        "Oster",
        "NATO",
    ]
    assert names("In Pell, Renn's men lost.") == ["Pell", "Renn"]


def test_content_and_order():
    assert content("The founders stopped") == content("founder stops")
    assert roles_swapped("King Aldo beat Duke Renn", "Duke Renn beat King Aldo") > 0
    assert roles_swapped("King Aldo beat Renn", "King Aldo beat Renn") == 0


def test_a_number_that_the_source_has_not_is_a_gate():
    gates = Surface("It has 14 weirs.", "It has fourteen weirs and 31 mills.").gates()
    assert [each.evidence for each in gates] == ["31 is not in the source"]
    assert not Surface("It has 14 weirs.", "One of its two parts has fourteen weirs.").gates()
