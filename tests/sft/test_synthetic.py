"""The set made on the spot: questions of many words, each answered by itself."""

import numpy as np

from megatron_k2.sft.packed_set import PackedSet
from megatron_k2.sft.synthetic import NUM_WORDS, write_echo_set


def test_a_sample_is_a_question_and_the_same_again_as_targets(tmp_path):
    write_echo_set(tmp_path / "echo", vocab_size=500, eod_id=1)
    found = PackedSet(tmp_path / "echo", capacity=64)
    words = set()
    for pack in (found[i] for i in range(20)):
        ends = np.cumsum(pack.lengths)
        for end, length in zip(ends, pack.lengths, strict=True):
            tokens, mask = pack.tokens[end - length : end], pack.loss_mask[end - length : end]
            half = int(length) // 2
            assert tokens[half] == 1
            assert tokens[:half].tolist() == tokens[half + 1 :].tolist()
            assert mask.tolist() == [0] * (half + 1) + [1] * half
            words |= set(tokens[:half].tolist())
    assert len(words) == NUM_WORDS


def test_what_is_there_stays_and_nothing_is_left_beside_it(tmp_path):
    for seed in (0, 1):
        write_echo_set(tmp_path / "echo", vocab_size=500, eod_id=1, seed=seed)
    assert [path.name for path in tmp_path.iterdir()] == ["echo"]
    again = tmp_path / "again"
    write_echo_set(again, vocab_size=500, eod_id=1, seed=0)
    assert (again / "chat.json").read_bytes() == (tmp_path / "echo" / "chat.json").read_bytes()
