"""K2's routing one token at a time, and the two balance rules one expert at a time."""

import math

from torch import Tensor


def route_token(
    logits: list[float], bias: list[float], topk: int, scale: float
) -> dict[int, float]:
    """Expert -> weight: sigmoid scores, the bias for selection only, normalised, scaled."""
    scores = [1 / (1 + math.exp(-x)) for x in logits]
    order = sorted(range(len(scores)), key=lambda e: scores[e] + bias[e], reverse=True)
    chosen = order[:topk]
    total = sum(scores[e] for e in chosen)
    return {e: scale * scores[e] / total for e in chosen}


def route_token_with_biased_weights(
    logits: list[float], bias: list[float], topk: int, scale: float
) -> dict[int, float]:
    """Deliberately wrong: the bias enters the weights too."""
    scores = [1 / (1 + math.exp(-x)) + b for x, b in zip(logits, bias, strict=True)]
    chosen = sorted(range(len(scores)), key=lambda e: scores[e], reverse=True)[:topk]
    total = sum(scores[e] for e in chosen)
    return {e: scale * scores[e] / total for e in chosen}


def next_bias(bias: Tensor, load: Tensor, rate: float, rule: str) -> list[float]:
    """arXiv:2408.15664, algorithm 1 ("sign"); arXiv:2502.16982, appendix C ("mean-sign")."""
    mean = sum(load.tolist()) / len(load)
    signs = [(mean > x) - (mean < x) for x in load.tolist()]
    drift = sum(signs) / len(signs) if rule == "mean-sign" else 0.0
    return [b + rate * (sign - drift) for b, sign in zip(bias.tolist(), signs, strict=True)]
