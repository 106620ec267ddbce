"""Diversity against definitions written out slowly."""

import itertools
import math
import random
from collections import Counter

import pytest

from megatron_k2.synthesis.rephrase.diversity import distinct, self_bleu, spread

ORDER = random.Random(0)
TEXTS = [" ".join(ORDER.choices("abcdef", k=ORDER.randint(3, 30))) for _ in range(12)]


def grams(text, order):
    words = text.split()
    return [tuple(words[i : i + order]) for i in range(len(words) - order + 1)]


def bleu(text, others):
    """Papineni et al., without the brevity penalty."""
    total = 0.0
    for order in range(1, 5):
        own = Counter(grams(text, order))
        matched = sum(
            min(n, max(Counter(grams(each, order))[gram] for each in others))
            for gram, n in own.items()
        )
        total += math.log(max(matched, 0.5) / max(sum(own.values()), 1)) / 4
    return min(math.exp(total), 1.0)


def test_self_bleu_is_the_mean_of_each_against_the_others():
    slow = [bleu(text, [*TEXTS[:n], *TEXTS[n + 1 :]]) for n, text in enumerate(TEXTS)]
    assert self_bleu(TEXTS) == pytest.approx(sum(slow) / len(slow))
    with_itself = [bleu(text, TEXTS) for text in TEXTS]
    assert sum(with_itself) / len(slow) > self_bleu(TEXTS), "a text must not be its own reference"
    assert self_bleu(["a b c d e"] * 2) == pytest.approx(1.0)
    assert self_bleu(["a"]) is None


def test_distinct_counts_once():
    every = [gram for text in TEXTS for gram in grams(text, 2)]
    assert distinct(TEXTS, 2) == len(set(every)) / len(every)
    assert distinct([], 1) is None


def test_spread_is_the_mean_distance_of_pairs():
    assert spread(["a b", "a b"]) == pytest.approx(0.0)
    assert spread(["a b", "c d"]) == pytest.approx(1.0)
    alike = ["one two three", "one two four", "one two five"]
    apart = ["one two three", "six seven eight", "nine ten eleven"]
    assert spread(alike) < spread(apart)
    pairs = [spread(list(pair)) for pair in itertools.combinations(alike, 2)]
    assert spread(alike) == pytest.approx(sum(pairs) / 3, abs=0.1)
    assert spread(["a"]) is None
