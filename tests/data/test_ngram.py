"""The bigram baseline against dictionaries of counts."""

import math
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest

from megatron_k2.data.ngram import (
    MAX_WEIGHT,
    NgramBaseline,
    held_out_tokens,
    interpolated_bigram,
)
from megatron_k2.errors import UserError


def tables(tokens):
    unigram, bigram = Counter(tokens), defaultdict(Counter)
    for a, b in pairwise(tokens):
        bigram[a][b] += 1
    return unigram, bigram


def nats(tokens, counts, vocab_size, weight):
    """Mean -log p by the formula, one token at a time."""
    unigram, bigram = counts
    total = 0.0
    for a, b in pairwise(tokens):
        p_1 = (unigram[b] + 1) / (unigram.total() + vocab_size)
        p_2 = bigram[a][b] / bigram[a].total() if bigram[a].total() else p_1
        total -= math.log(weight * p_2 + (1 - weight) * p_1)
    return total / (len(tokens) - 1)


def stream(seed, n, vocab_size):
    """Tokens with structure: mostly the predecessor times three, else something Zipf-like."""
    rng = np.random.default_rng(seed)
    tokens = [1]
    for _ in range(n - 1):
        noise = int(min(rng.zipf(1.5), vocab_size - 1))
        tokens.append(3 * tokens[-1] % vocab_size if rng.random() < 0.5 else noise)
    return np.array(tokens)


@pytest.mark.parametrize("vocab_size", [50, 163_840])
def test_baseline_equals_the_dictionary_twin(vocab_size):
    train, valid = stream(0, 3000, 50), stream(1, 800, 50)
    train[train == 49] = vocab_size - 1
    valid[5] = vocab_size - 2  # never seen in training
    result = interpolated_bigram(train, valid, vocab_size, num_held_out=400)
    counts = tables(train.tolist())
    assert result.unigram_nats == pytest.approx(nats(valid.tolist(), counts, vocab_size, 0), 1e-12)
    expected = nats(valid.tolist(), counts, vocab_size, result.weight)
    assert result.bigram_nats == pytest.approx(expected, rel=1e-12)
    assert result.bigram_nats < result.unigram_nats
    assert result.num_valid_tokens == 799
    assert result.num_distinct_pairs == sum(len(row) for row in counts[1].values())


def test_weight_is_the_best_on_the_held_out_tail_and_not_on_validation():
    train, valid = stream(0, 3000, 50), stream(1, 800, 50)
    result = interpolated_bigram(train, valid, 50, num_held_out=400)
    head, tail = tables(train[:2600].tolist()), train[2600:].tolist()
    grid = np.linspace(0, 0.999, 1000)
    best = grid[np.argmin([nats(tail, head, 50, w) for w in grid])]
    assert result.weight == pytest.approx(best, abs=0.001)


def test_a_twin_that_forgets_the_add_one_mass_disagrees():
    train, valid = stream(0, 3000, 50), stream(1, 800, 50)
    result = interpolated_bigram(train, valid, 50, num_held_out=400)
    wrong = nats(valid.tolist(), tables(train.tolist()), 0, 0)
    assert abs(result.unigram_nats - wrong) > 1e-3


def test_a_weight_chosen_with_the_tail_among_the_counts_is_too_trusting():
    train, valid = stream(0, 3000, 50), stream(1, 800, 50)
    result = interpolated_bigram(train, valid, 50, num_held_out=400)
    grid = np.linspace(0, 0.999, 200)
    leaky = [nats(train[2600:].tolist(), tables(train.tolist()), 50, w) for w in grid]
    assert grid[np.argmin(leaky)] > result.weight + 0.01


def test_probabilities_of_all_next_tokens_sum_to_one():
    """Over every b after each a, seen or unseen as a context."""
    from megatron_k2.data.ngram import _count

    counts = _count(np.array([0, 1, 2, 0, 1, 1, 3]), 5)
    for a in range(5):
        pairs = [counts.probabilities(np.array([a, b])) for b in range(5)]
        assert sum(p_1[0] for p_1, _ in pairs) == pytest.approx(1, abs=1e-12)
        assert sum(p_2[0] for _, p_2 in pairs) == pytest.approx(1, abs=1e-12)


def test_a_deterministic_stream_takes_the_largest_weight():
    tokens = np.tile(np.arange(7), 200)
    result = interpolated_bigram(tokens, tokens[:100], 7)
    assert result.weight == pytest.approx(MAX_WEIGHT, abs=1e-9)
    assert result.bigram_nats < 0.01
    assert result.unigram_nats == pytest.approx(math.log(7), abs=1e-9)
    assert isinstance(result, NgramBaseline)


def test_held_out_tail_is_whole_documents():
    assert held_out_tokens(np.arange(1, 101)) == 96 + 97 + 98 + 99 + 100
    assert held_out_tokens(np.array([10, 3])) == 3


def test_too_few_tokens_and_foreign_ids_are_refused():
    tokens = np.arange(100) % 7
    with pytest.raises(UserError, match="needs 2 or more"):
        interpolated_bigram(tokens[:3], tokens, 7)
    with pytest.raises(UserError, match="token id 6 is not below vocab_size 6"):
        interpolated_bigram(tokens, tokens, 6)
