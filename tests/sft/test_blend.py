"""Blends: shares, order, repetition; pretraining text in pieces."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from megatron_k2.data.manifest import TokenizerRecord
from megatron_k2.data.prepare import PrepareOptions, prepare
from megatron_k2.errors import UserError
from megatron_k2.sft.blend import Blend, draw_order
from megatron_k2.sft.packed_set import PackedSequence, PretrainText, cut_documents

TOKENIZER = TokenizerRecord("tokenizer.json", "tokenizer", "a" * 64, 400, 1)


@dataclass
class Numbers:
    """A set whose sequences are their own numbers."""

    first: int
    count: int
    tokenizer: TokenizerRecord = field(default=TOKENIZER)
    content_hash: str = "x"

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        tokens = np.array([self.first + index, 0], dtype=np.int32)
        return PackedSequence(tokens, np.ones(2, np.uint8), np.array([2]), np.ones(1, np.float32))


def drawn(blend):
    return [int(blend[index].tokens[0]) for index in range(len(blend))]


@pytest.mark.parametrize("weights", [[1.0], [1, 1], [0.7, 0.2, 0.1], [1000, 1]])
def test_each_set_has_its_share_at_every_moment(weights):
    sets, draws = draw_order(weights, 2000)
    shares = np.array(weights) / sum(weights)
    for number, share in enumerate(shares):
        so_far = np.cumsum(sets == number)
        assert np.abs(so_far - share * np.arange(1, 2001)).max() <= 1
        assert draws[sets == number].tolist() == list(range(int(so_far[-1])))


def test_a_set_is_used_up_before_it_repeats_in_another_order():
    found = drawn(Blend([(1, Numbers(0, 7))], 21, seed=3))
    epochs = [found[0:7], found[7:14], found[14:21]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_longer_run_begins_as_a_shorter_one_and_another_seed_does_not():
    parts = [(2, Numbers(0, 30)), (1, Numbers(100, 20))]
    long = drawn(Blend(parts, 60, seed=1))
    assert drawn(Blend(parts, 25, seed=1)) == long[:25]
    assert drawn(Blend(parts, 25, seed=2)) != long[:25]
    hashes = {Blend(parts, 25, seed).content_hash for seed in (1, 2)}
    assert len(hashes) == 2


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([], "name one"),
        ([(0, Numbers(0, 1))], "weight 0"),
        ([(float("nan"), Numbers(0, 1))], "weight nan"),
        ([(1, Numbers(0, 0))], "no place in a blend"),
        (
            [(1, Numbers(0, 1)), (1, Numbers(0, 1, TokenizerRecord("k", "p", "b" * 64, 4, 1)))],
            "2 tokenizers",
        ),
    ],
)
def test_a_blend_of_nothing_or_of_two_vocabularies_is_refused(parts, said):
    with pytest.raises(UserError, match=said):
        Blend(parts, 5, seed=0)


def test_cut_documents_predict_every_token_but_the_first_once():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, 50)
    tokens, starts = np.arange(lengths.sum()), np.cumsum(lengths) - lengths
    begins, pieces = cut_documents(lengths, 8)
    assert 2 <= pieces.min() <= pieces.max() <= 9
    predicted = np.concatenate([tokens[b + 1 : b + n] for b, n in zip(begins, pieces, strict=True)])
    assert sorted(predicted.tolist()) == sorted(set(tokens.tolist()) - set(starts.tolist()))


def test_pretraining_text_comes_as_sequences_without_untrained_tokens(tmp_path):
    (tmp_path / "a.txt").write_text("some words of text " * 40)
    (tmp_path / "b.txt").write_text("other words")
    options = PrepareOptions(
        tmp_path / "data", (tmp_path,), train_bpe=300, validation_fraction=0, suffixes=(".txt",)
    )
    prepare(options)
    text = PretrainText(tmp_path / "data", capacity=64, multiple=2)
    found = [text[index] for index in range(len(text))]
    from megatron_k2.data.indexed import read_sequence_lengths

    lengths = read_sequence_lengths(tmp_path / "data" / "train")
    assert sum(int((each.lengths - 1).sum()) for each in found) == (lengths - 1).sum()
    assert all((-(-(each.lengths - 1) // 2) * 2).sum() <= 64 for each in found)
    assert all(each.loss_mask.all() for each in found)
    with pytest.raises(UserError, match="no split 'valid'; it has train"):
        PretrainText(tmp_path / "data", "valid", capacity=64)
