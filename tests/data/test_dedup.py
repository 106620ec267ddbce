"""Near duplicates and evaluation texts, against the sets themselves."""

import random

import numpy as np
import pytest

from megatron_k2.data.decontaminate import LEAST_WORDS, Evaluations, evaluations
from megatron_k2.data.dedup import (
    Deduplicator,
    rows_of_a_band,
    runs,
    signature,
    similarity,
    words_of,
)
from megatron_k2.errors import UserError

WORDS = [f"w{number}" for number in range(5000)]


def pair(order, num_words, num_changed):
    text = order.sample(WORDS, num_words)
    other = list(text)
    for place in order.sample(range(num_words), num_changed):
        other[place] = f"x{place}"
    return " ".join(text), " ".join(other)


def jaccard(one, other):
    a, b = (set(runs(words_of(text), 5)) for text in (one, other))
    return len(a & b) / len(a | b)


def test_similarity_is_that_of_the_sets_within_its_error():
    order = random.Random(0)
    errors = []
    for _ in range(60):
        one, other = pair(order, 200, order.choice([0, 2, 5, 10, 20, 40]))
        errors.append(similarity(signature(one), signature(other)) - jaccard(one, other))
    assert abs(float(np.mean(errors))) < 0.02, "biased"
    assert max(map(abs, errors)) < 5 * 0.045
    same_letters = similarity(signature("a b c d e f"), signature("f e d c b a"))
    assert same_letters < 0.2, "the order of words must count"


def test_every_near_duplicate_is_found_and_no_distinct_text():
    order, dedup = random.Random(1), Deduplicator(0.7)
    number = 150
    pairs = [pair(order, 150, 2) for _ in range(number)]
    assert all(dedup.add(f"own {n}", one) is None for n, (one, _) in enumerate(pairs))
    found = [dedup.add(f"other {n}", other) for n, (_, other) in enumerate(pairs)]
    assert [each and each.of for each in found] == [f"own {n}" for n in range(number)]
    near = [jaccard(*each) for each in pairs]
    assert min(near) > 0.8
    far = pair(order, 150, 60)
    assert jaccard(*far) < 0.4
    assert dedup.add("far", far[0]) is None
    assert dedup.add("far too", far[1]) is None


def test_bands_find_pairs_at_the_threshold():
    for threshold in (0.3, 0.5, 0.7, 0.8, 0.9):
        rows = rows_of_a_band(threshold)
        assert 1 - (1 - threshold**rows) ** (128 // rows) >= 0.95
    assert rows_of_a_band(0.8) > rows_of_a_band(0.4), "fewer candidates where that is enough"


def test_short_and_empty_texts():
    dedup = Deduplicator()
    assert dedup.add("a", "one two") is None
    assert dedup.add("b", "One, two!").of == "a"
    assert dedup.add("c", "two one") is None
    assert dedup.add("d", "") is None
    with pytest.raises(UserError, match="threshold"):
        Deduplicator(0.0)


def test_contamination_is_a_run_of_thirteen_words():
    order = random.Random(2)
    test_text = " ".join(order.sample(WORDS, 30))
    known = evaluations([("suite/1", test_text)])
    words = test_text.split()
    for length, is_met in ((13, True), (12, False)):
        inside = " ".join(["before", *words[5 : 5 + length], "after"])
        assert (known.met_in(inside) is not None) == is_met, length
    name, run = known.met_in("x. " + test_text.upper().replace(" ", ", ") + " y")
    assert name == "suite/1"
    assert run == " ".join(words[:13])


def test_short_evaluations_are_looked_for_whole():
    known = evaluations([("q", "Who founded the town of Lisk?"), ("short", "Who is it?")])
    assert (known.num_texts, known.num_too_short) == (1, 1)
    assert known.met_in("Somebody asked: who founded the town of Lisk? Nobody knew.")[0] == "q"
    assert known.met_in("Who founded the city of Lisk? Who is it?") is None
    with pytest.raises(UserError, match=f"{LEAST_WORDS} or more"):
        Evaluations(3)
