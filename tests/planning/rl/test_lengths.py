"""Moments in closed form against drawn lengths."""

import pytest

from megatron_k2.errors import UserError
from megatron_k2.planning.rl.lengths import Lengths

MANY = 40_000


@pytest.mark.parametrize("sigma", [0.3, 1.0, 1.5])
def test_moments_are_those_of_drawn_lengths(sigma):
    lengths = Lengths(median=1000, sigma=sigma, most=8000, prompt=200)
    drawn = [lengths.draw(str(number)) for number in range(MANY)]
    assert max(drawn) <= 8000
    mean, square = (sum(n**k for n in drawn) / MANY for k in (1, 2))
    assert lengths.mean == pytest.approx(mean, rel=0.02)
    assert lengths.moment(2) == pytest.approx(square, rel=0.04)


def test_a_slot_holds_more_than_half_the_mean():
    """A slot looked at at any time: long answers are in it for longer."""
    lengths = Lengths(median=1000, sigma=1.0, most=8000, prompt=1)
    drawn = [lengths.draw(str(number)) for number in range(MANY)]
    held = sum(n * (n + 1) / 2 for n in drawn) / sum(drawn)
    assert lengths.held - 1 == pytest.approx(held, rel=0.03)
    assert lengths.held > 1.5 * lengths.mean / 2


def test_without_width_every_answer_is_the_median():
    lengths = Lengths(median=500, sigma=0, most=400, prompt=100)
    assert (lengths.mean, lengths.moment(2), lengths.document_tokens) == (400, 160_000, 500)


@pytest.mark.parametrize("wrong", [{"median": 0}, {"sigma": -1}, {"most": 0}, {"prompt": 0}])
def test_lengths_that_are_none_are_refused(wrong):
    with pytest.raises(UserError, match="1 token or more"):
        Lengths(**{"median": 5, "sigma": 1, "most": 9, "prompt": 3} | wrong)
