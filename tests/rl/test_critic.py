"""The critic's closed loop on a toy: with refreshes it learns, without them it is gamed."""

import asyncio
import math

import pytest

from megatron_k2.chat.template import Renderer
from megatron_k2.engine.protocol import Candidate, Limits, Output, Token
from megatron_k2.errors import UserError
from megatron_k2.records.rollouts import End
from megatron_k2.rewards.judge import LETTERS, Question
from megatron_k2.rewards.rubrics import DEFAULT
from megatron_k2.rl.critic import EngineJudge, Refresher, Schedule, on_policy_pairs
from megatron_k2.rl.record import Group, Segment, Trajectory
from tests.rl.toy_critic import LinearCritic, group_of, trained

MARGIN = 0.05


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_refreshed_critic_learns_and_one_that_is_not_is_gamed(seed):
    proxies, golds, _ = asyncio.run(trained(seed, refreshes=False))
    assert proxies[-1] > proxies[0]
    assert golds[-1] < golds[0] - 0.1
    _, better, measured = asyncio.run(trained(seed, refreshes=True))
    assert measured[0].after >= measured[0].before + MARGIN
    assert better[-1] > golds[-1] + 0.2
    assert better[-1] > better[0]


def test_pairs_are_of_verdicts_and_not_of_rewards():
    """A right answer that was too long is still the better one."""
    texts = [("The right one.", 1.0), ("A wrong one.", 0.0), ("Another wrong one.", 0.0)]
    group = group_of(3, texts)
    shaped = Group(
        3,
        "sums",
        "3",
        tuple(
            Trajectory(t.segments, t.reward - 2, t.parts, t.end, t.reason)
            for t in group.trajectories
        ),
    )
    (pair,) = on_policy_pairs([shaped], lambda g: "What?", lambda t: t.reason)
    assert pair.best == "The right one."
    assert on_policy_pairs([shaped], lambda g: "What?", lambda t: t.reason) == [pair]


def test_dead_and_unknown_groups_give_no_pair():
    same = group_of(1, [("x", 1.0), ("y", 1.0)])
    blank = Trajectory(same.trajectories[0].segments, None, {}, End.ENVIRONMENT, "z")
    groups = [same, Group(2, "sums", "2", (same.trajectories[0], blank))]
    assert on_policy_pairs(groups, lambda g: "?", lambda t: t.reason) == []
    assert (
        on_policy_pairs([group_of(1, [("x", 1.0), ("x", 0.0)])], lambda g: "?", lambda t: t.reason)
        == []
    )


def test_each_answer_is_in_one_pair_and_sides_are_mixed():
    groups = [group_of(n, [(f"r{n}{i}", i % 2) for i in range(8)]) for n in range(50)]
    found = on_policy_pairs(groups, lambda g: f"p{g.ordinal}", lambda t: t.reason, most=3)
    assert len(found) == 150
    texts = [text for pair in found for text in (pair.a, pair.b)]
    assert len(set(texts)) == 300
    assert 50 < sum(pair.better == "a" for pair in found) < 100


def test_a_refresh_waits_for_its_time_and_for_both_halves():
    groups = [
        group_of(n, [(f"The sum is {n}.", 1.0), (f"The sum is {n + 1}.", 0.0)]) for n in range(60)
    ]
    pairs = on_policy_pairs(groups, lambda g: f"What is {g.ordinal} plus 0 ?", lambda t: t.reason)
    held_out = [pair for pair in pairs if pair.is_held_out]
    schedule = Schedule(every=2)
    assert schedule.training(1, []) == schedule.training(0, pairs) == []
    assert schedule.training(1, held_out * 2) == []
    training = schedule.training(1, pairs)
    assert training
    assert sorted(map(repr, training + held_out)) == sorted(map(repr, pairs))
    with pytest.raises(UserError, match="1 or more"):
        Schedule(every=0)


def test_a_refresh_is_measured_once_before_and_after():
    groups = [
        group_of(n, [(f"The sum is {n}.", 1.0), (f"The sum is {n + 1}.", 0.0)]) for n in range(60)
    ]
    pairs = on_policy_pairs(groups, lambda g: f"What is {g.ordinal} plus 0 ?", lambda t: t.reason)

    async def run():
        refresher = Refresher(LinearCritic())
        assert await refresher.end() is None
        await refresher.begin(pairs)
        return await refresher.end(), await refresher.end()

    found, again = asyncio.run(run())
    assert found.num_pairs == sum(not pair.is_held_out for pair in pairs)
    assert found.before == found.after  # nothing was learnt in between
    assert again is None


class Tokens:
    """Letters are tokens of their own; what else there is, a byte each."""

    def encode(self, text):
        return list(text.encode())


class Scripted:
    limits = Limits(256, 1 << 20, 4)

    def __init__(self, top):
        self.top = top

    async def generate(self, request):
        assert request.params.max_tokens == 1
        yield Output((Token(65, -0.1, tuple(self.top)),))


class Render(Renderer):
    def __init__(self):
        self.tokenizer = Tokens()

    def render(self, messages, tools=(), *, add_generation_prompt=False):
        assert add_generation_prompt
        text = "".join(message.content for message in messages)
        return type("Rendered", (), {"ids": self.tokenizer.encode(text)})


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        ([(65, math.log(0.6)), (66, math.log(0.2))], 0.75),
        ([(66, -0.1)], 0.0),
        ([(65, -0.1)], 1.0),
        ([(67, -0.1)], None),
    ],
)
def test_the_actor_as_its_own_critic(top, expected):
    judge = EngineJudge(Scripted([Candidate(*each) for each in top]), Render())
    found = asyncio.run(judge.compare(Question("p", "x", "y", DEFAULT)))
    assert found.preference == (None if expected is None else pytest.approx(expected))
    assert found.num_tokens > 100


def test_letters_must_be_tokens():
    class Long(Render):
        def __init__(self):
            self.tokenizer = type("T", (), {"encode": staticmethod(lambda text: [1, 2])})

    with pytest.raises(UserError, match=f"writes '{LETTERS[0]}' as 2 tokens"):
        EngineJudge(Scripted([]), Long())


def test_segments_are_not_looked_at():
    """Pairs come from what ``text_of`` says, so that whoever calls chooses what a critic reads."""
    trajectories = tuple(
        Trajectory((Segment((n,)), Segment((n,), (-1.0,), 0)), v, {"verdict": v}, End.OVER)
        for n, v in ((1, 1.0), (2, 0.0))
    )
    (pair,) = on_policy_pairs(
        [Group(0, "s", "t", trajectories)], lambda g: "p", lambda t: str(t.token_ids)
    )
    assert pair.best == "(1, 1)"
