"""Draws against a slow derivation by hand, and frequencies against probabilities."""

import math

import pytest
import torch

from megatron_k2.engine.local.sampling import Row, choose, filtered, scored, uniform
from megatron_k2.engine.protocol import SamplingParams

LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0, 3.0, 0.0]])


def slow(logits, p):
    """Temperature, then the k best, then the fewest that reach p, then min_p."""
    weights = [math.exp(x / p.temperature) for x in logits]
    probs = {i: w / sum(weights) for i, w in enumerate(weights)}
    ranked = sorted(probs, key=lambda i: -probs[i])
    if p.top_k:
        ranked = ranked[: p.top_k]
    total = sum(probs[i] for i in ranked)
    kept, reached = [], 0.0
    for i in ranked:
        if reached < p.top_p:
            kept.append(i)
        reached += probs[i] / total
    best = max(probs[i] for i in kept)
    kept = [i for i in kept if probs[i] >= p.min_p * best]
    whole = sum(probs[i] for i in kept)
    return [probs[i] / whole if i in kept else 0.0 for i in range(len(logits))]


SETTINGS = [
    SamplingParams(),
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=1.7, top_p=0.8),
    SamplingParams(top_k=2),
    SamplingParams(top_k=3, top_p=0.7, temperature=2.0),
    SamplingParams(min_p=0.2),
    SamplingParams(top_p=0.95, min_p=0.1, temperature=1.3),
]


def shares(params):
    found = filtered(LOGITS, [params])[0]
    return (found / found.sum()).tolist()


@pytest.mark.parametrize("params", SETTINGS)
def test_filters_are_the_slow_ones(params):
    assert shares(params) == pytest.approx(slow(LOGITS[0].tolist(), params), abs=1e-6)


def test_top_p_before_temperature_would_be_found():
    params = SamplingParams(temperature=4.0, top_p=0.8)
    probs = LOGITS.softmax(-1)[0].tolist()
    early = [i for i in range(6) if sum(q for q in probs if q > probs[i]) < 0.8]
    assert early != [i for i, share in enumerate(shares(params)) if share]


def test_rows_keep_their_own_parameters():
    together = filtered(LOGITS.repeat(len(SETTINGS), 1), SETTINGS)
    for params, line in zip(SETTINGS, together, strict=True):
        assert (line / line.sum()).tolist() == pytest.approx(shares(params), abs=1e-6)


def test_draws_have_the_frequencies():
    params = SamplingParams(temperature=0.8, top_p=0.9)
    rows = [Row(params, uniform(0, place)) for place in range(20_000)]
    chosen = choose(LOGITS.repeat(len(rows), 1), rows)
    counts = torch.bincount(chosen, minlength=6) / len(rows)
    assert counts.tolist() == pytest.approx(slow(LOGITS[0].tolist(), params), abs=0.015)


def test_a_seed_gives_its_tokens_whatever_else_is_in_the_batch():
    params, greedy = SamplingParams(temperature=1.2), SamplingParams(temperature=0)

    def drawn(others):
        found = []
        for place in range(20):
            rows = [Row(params, uniform(7, place))]
            rows += [Row(p, uniform(i, place)) for i, p in enumerate(others)]
            found.append(int(choose(LOGITS.repeat(len(rows), 1), rows)[0]))
        return found

    assert drawn([]) == drawn([greedy, params, SamplingParams(top_k=2)])


def test_greedy_takes_the_lowest_of_equals():
    row = Row(SamplingParams(temperature=0), 0.0)
    assert choose(torch.tensor([[1.0, 4.0, 4.0]]), [row]).tolist() == [1]


def test_the_penalty_pushes_both_signs_down():
    params = SamplingParams(temperature=0, repetition_penalty=4.0)
    row = Row(params, 0.0, seen=[0, 0, 2])
    assert choose(torch.tensor([[3.0, 1.0, -0.5]]), [row]).tolist() == [1]
    assert choose(torch.tensor([[-0.5, -1.0, -3.0]]), [row]).tolist() == [1]


def test_logprobs_are_the_models_own():
    tokens = scored(LOGITS, torch.tensor([1]), [3], "v")
    expected = LOGITS.log_softmax(-1)[0]
    assert tokens[0].logprob == pytest.approx(expected[1].item(), abs=1e-6)
    assert [c.id for c in tokens[0].top] == [4, 0, 1]
    assert tokens[0].top[0].logprob == pytest.approx(expected[4].item(), abs=1e-6)
    assert tokens[0].weight_version == "v"


def test_neighbouring_seeds_and_places_draw_apart():
    drawn = torch.tensor([[uniform(seed, place) for place in range(300)] for seed in range(300)])
    assert drawn.unique().numel() > 89_000  # 90,000 draws of 2^24: about 240 pairs of equals
    assert abs(drawn.mean() - 0.5) < 0.005
    assert torch.corrcoef(drawn).fill_diagonal_(0).abs().max() < 0.35
    assert torch.corrcoef(drawn.t()).fill_diagonal_(0).abs().max() < 0.35
