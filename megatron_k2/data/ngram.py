"""The yardstick for a language model's first hours: unigram and interpolated bigram loss, in nats.

A model whose validation loss is above the bigram's has learned less than a table of pairs. Counts
are kept as sorted unique pairs, so memory goes with the number of tokens and not with V²: 163,840
ids are as easy as 4,096.

    p_1(b)     = (c(b) + 1) / (N + V)                               add-one
    p_2(b | a) = c(a, b) / c(a, ·), or p_1(b) where a was never followed by anything
    p(b | a)   = w p_2(b | a) + (1 - w) p_1(b)

``w`` is chosen on the last documents of the *training* tokens, with counts from the rest; the
counts are then taken over all training tokens and the validation tokens are looked at once.
"""

from dataclasses import dataclass

import numpy as np

from megatron_k2.errors import UserError

BASELINE_FILE = "ngram_baseline.json"
HELD_OUT_FRACTION = 0.05
MAX_WEIGHT = 0.999
"""A pair never seen must keep some probability, even if the held-out text has none such."""
_BISECTIONS = 50


@dataclass(frozen=True)
class NgramBaseline:
    """Mean negative log-likelihoods over validation tokens 1..n-1, each given its predecessor.

    Document boundaries are crossed and EOD is a token like any other, as for the language model.
    """

    unigram_nats: float
    bigram_nats: float
    weight: float
    """w, the bigram's share."""
    vocab_size: int
    num_train_tokens: int
    num_valid_tokens: int
    """Predicted ones: one less than there are."""
    num_distinct_pairs: int


@dataclass(frozen=True)
class _Counts:
    """Counts of one token stream of N tokens over V ids."""

    vocab_size: int
    unigram: np.ndarray
    """c(b), [V] int64."""
    context: np.ndarray
    """c(a, ·), [V] int64: as unigram, but for the last token, which nothing follows."""
    pairs: np.ndarray
    """a V + b, sorted, [P] int64."""
    pair_counts: np.ndarray
    """c(a, b), [P] int64."""

    def probabilities(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """p_1(b) and p_2(b | a) at every position but the first, each [n - 1] fp64."""
        a, b = tokens[:-1], tokens[1:]
        p_1 = (self.unigram[b] + 1) / (self.unigram.sum() + self.vocab_size)
        wanted = a * self.vocab_size + b
        at = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
        count = np.where(self.pairs[at] == wanted, self.pair_counts[at], 0)
        followed = self.context[a]
        p_2 = np.where(followed > 0, count / np.maximum(followed, 1), p_1)
        return p_1, p_2


def _count(tokens: np.ndarray, vocab_size: int) -> _Counts:
    # int64 before the product: V² is 2.7e10 for K2's vocabulary, past 32 bits.
    pairs, pair_counts = np.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True)
    return _Counts(
        vocab_size=vocab_size,
        unigram=np.bincount(tokens, minlength=vocab_size),
        context=np.bincount(tokens[:-1], minlength=vocab_size),
        pairs=pairs,
        pair_counts=pair_counts,
    )


def _best_weight(p_1: np.ndarray, p_2: np.ndarray) -> float:
    """The w in [0, MAX_WEIGHT] of largest likelihood.

    The log-likelihood is concave in w, so its derivative has at most one zero: bisection finds it.
    """
    low, high = 0.0, MAX_WEIGHT
    for _ in range(_BISECTIONS):
        w = (low + high) / 2
        slope = np.sum((p_2 - p_1) / (w * p_2 + (1 - w) * p_1))
        low, high = (w, high) if slope > 0 else (low, w)
    return (low + high) / 2


def held_out_tokens(document_tokenss: np.ndarray) -> int:
    """Tokens of the last 5 % of documents (at least one, never all)."""
    num_documents = len(document_tokenss)
    num_held_out = min(max(round(HELD_OUT_FRACTION * num_documents), 1), num_documents - 1)
    return int(document_tokenss[num_documents - num_held_out :].sum())


def interpolated_bigram(
    train_tokens: np.ndarray,
    valid_tokens: np.ndarray,
    vocab_size: int,
    num_held_out: int | None = None,
) -> NgramBaseline:
    """Fit on training tokens, choose w on their tail, evaluate once on validation tokens.

    Args:
        train_tokens: [N] integer ids.
        valid_tokens: [n] integer ids.
        vocab_size: V, in ids; also the add-one mass.
        num_held_out: Training tokens at the end that choose w; 5 % of the tokens if None. Whole
            documents are better, see ``held_out_tokens``.

    Raises:
        UserError: too few tokens, or an id outside the vocabulary.
    """
    train = np.asarray(train_tokens, dtype=np.int64)
    valid = np.asarray(valid_tokens, dtype=np.int64)
    if num_held_out is None:
        num_held_out = round(HELD_OUT_FRACTION * len(train))
    cut = len(train) - num_held_out
    if cut < 2 or num_held_out < 2 or len(valid) < 2:
        raise UserError(
            f"{cut} training, {num_held_out} held-out and {len(valid)} validation tokens: each "
            "needs 2 or more; prepare a larger dataset"
        )
    largest = max(int(train.max()), int(valid.max()))
    if largest >= vocab_size:
        raise UserError(f"token id {largest} is not below vocab_size {vocab_size}")
    weight = _best_weight(*_count(train[:cut], vocab_size).probabilities(train[cut:]))
    counts = _count(train, vocab_size)
    p_1, p_2 = counts.probabilities(valid)
    return NgramBaseline(
        unigram_nats=float(-np.mean(np.log(p_1))),
        bigram_nats=float(-np.mean(np.log(weight * p_2 + (1 - weight) * p_1))),
        weight=weight,
        vocab_size=vocab_size,
        num_train_tokens=len(train),
        num_valid_tokens=len(valid) - 1,
        num_distinct_pairs=len(counts.pairs),
    )
