"""How different texts are from one another: distinct n-grams, self-BLEU, spread.

All by words and without a model. Higher distinct-n and spread and lower self-BLEU are more diverse;
each depends on how many texts there are, so compare samples of one size.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from megatron_k2.data.dedup import words_of

_BLEU_ORDER = 4
_DIMENSIONS = 1024


def _ngrams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


def distinct(texts: Sequence[str], order: int) -> float | None:
    """Distinct n-grams over all (Li et al., arXiv:1510.03055), 0 to 1; ``None`` without any."""
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        counts.update(_ngrams(words_of(text), order))
    total = sum(counts.values())
    return len(counts) / total if total else None


def self_bleu(texts: Sequence[str]) -> float | None:
    """Mean BLEU-4 of each text against all others (Zhu et al., arXiv:1802.01886), 0 to 1.

    An order without a match counts as half of one, or a text of one new word in four would have 0.
    The brevity penalty is left out: some other text is always as long.
    """
    if len(texts) < 2:
        return None
    words = [words_of(text) for text in texts]
    logs = np.zeros(len(texts))
    for order in range(1, _BLEU_ORDER + 1):
        counts = [_ngrams(each, order) for each in words]
        first, second = _two_largest(counts)
        for number, own in enumerate(counts):
            matched = 0
            for gram, times in own.items():
                # The largest count of the others: the second where this text has the largest.
                largest = second.get(gram, 0) if times == first[gram] else first[gram]
                matched += min(times, largest)
            total = max(sum(own.values()), 1)
            logs[number] += math.log(max(matched, 0.5) / total)
    return float(np.exp(logs / _BLEU_ORDER).clip(max=1.0).mean())


def _two_largest(
    counts: Sequence[Counter[tuple[str, ...]]],
) -> tuple[dict[tuple[str, ...], int], dict[tuple[str, ...], int]]:
    """Of each n-gram the largest count in one text, and the largest in another."""
    first: dict[tuple[str, ...], int] = {}
    second: dict[tuple[str, ...], int] = {}
    for own in counts:
        for gram, times in own.items():
            if times >= first.get(gram, 0):
                second[gram], first[gram] = first.get(gram, 0), times
            elif times > second.get(gram, 0):
                second[gram] = times
    return first, second


def spread(texts: Sequence[str]) -> float | None:
    """Mean cosine distance of two texts as hashed bags of words weighed by rarity, 0 to 1.

    It stands in for an embedding's spread, which needs a model.
    """
    if len(texts) < 2:
        return None
    bags = [Counter(map(_place, words_of(text))) for text in texts]
    present = Counter(place for bag in bags for place in bag)
    vectors = np.zeros((len(texts), _DIMENSIONS))
    for number, bag in enumerate(bags):
        for place, times in bag.items():
            rarity = math.log((1 + len(texts)) / (1 + present[place])) + 1
            vectors[number, place] = times * rarity
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    total, number = float((vectors.sum(0) ** 2).sum()), len(texts)
    own = float((vectors**2).sum())
    return 1 - (total - own) / (number * (number - 1))


def _place(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest()) % _DIMENSIONS
