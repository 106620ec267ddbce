import pytest
import torch

from megatron_k2.engine.mcore.generate import choose, generate, greedy, text_pieces
from megatron_k2.engine.mcore.jobs import check_length, round_up
from megatron_k2.engine.mcore.options import evaluate_parser, without_nproc
from megatron_k2.errors import UserError
from megatron_k2.parallel.layout import Layout

LOGITS = torch.tensor([0.6, 0.25, 0.1, 0.05]).log()


def _frequencies(temperature: float, top_p: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    draws = [choose(LOGITS, temperature, top_p, generator) for _ in range(4000)]
    return torch.bincount(torch.tensor(draws), minlength=4) / len(draws)


def test_temperature_zero_takes_the_most_likely():
    assert choose(LOGITS, 0, 1.0, torch.Generator()) == 0


def test_draws_follow_the_softmax_at_the_temperature():
    sharpened = torch.tensor([0.6, 0.25, 0.1, 0.05]) ** 2
    assert _frequencies(0.5, 1.0) == pytest.approx((sharpened / sharpened.sum()).numpy(), abs=0.03)
    assert _frequencies(0.5, 1.0) != pytest.approx(LOGITS.exp().numpy(), abs=0.03)


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 1), (0.6, 1), (0.7, 2), (0.86, 3), (1.0, 4)])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, kept):
    found = _frequencies(1.0, top_p)
    expected = torch.tensor([0.6, 0.25, 0.1, 0.05])
    expected[kept:] = 0
    assert found == pytest.approx((expected / expected.sum()).numpy(), abs=0.03)


class Utf8:
    """One token a byte."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def test_a_character_is_shown_when_its_last_byte_is_there():
    pieces = list(text_pieces(Utf8(), list(b"a"), iter("né€!".encode())))
    assert pieces == ["n", "é", "€", "!"]


def test_an_unfinished_character_is_shown_at_the_end():
    assert list(text_pieces(Utf8(), [], iter(b"x\xe2\x82"))) == ["x", "�"]


def test_lengths_beyond_the_models_positions_are_refused():
    check_length(10, 54, 64)
    with pytest.raises(UserError, match="at most 54 new tokens"):
        check_length(10, 55, 64)
    with pytest.raises(UserError, match="empty"):
        check_length(0, 1, 64)


def test_lengths_are_rounded_to_what_the_layout_cuts():
    assert round_up(5, Layout()) == 5
    assert round_up(5, Layout(tp=2)) == 6
    assert round_up(5, Layout(cp=2, tp=2)) == 8


def test_ranks_are_not_told_nproc_and_abbreviations_are_refused(capsys):
    assert without_nproc(["--load", "a", "--nproc", "2", "--data", "b"]) == [
        *["--load", "a", "--data", "b"]
    ]
    with pytest.raises(SystemExit):
        evaluate_parser().parse_args(["--load", "a", "--data", "b", "--npro", "2"])
    assert "--npro" in capsys.readouterr().err


class Sums:
    """A causal model of 11 ids: what follows is the sum of all before, and 0 ends a row."""

    max_length = 64

    def whole_logits(self, tokens, positions):
        following = tokens.cumsum(-1)[:, positions] % 11
        return torch.nn.functional.one_hot(following, 11).float()


def test_a_batch_of_prompts_gives_each_its_own_greedy_tokens():
    prompts, device = [[3], [1, 2, 4, 4, 9], [5, 5], [10, 1]], torch.device("cpu")
    common = {"layout": Layout(1), "max_new_tokens": 9, "device": device, "eod_id": 0}
    found = greedy(Sums(), prompts, **common)
    assert found == [list(generate(Sums(), one, temperature=0, **common)) for one in prompts]
    assert found[-1] == [0], "its first token ends it"
    assert {len(row) for row in found} != {9}
    assert max(map(len, found)) > 1
