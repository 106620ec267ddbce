"""Harmful requests and their benign twins; prompts that a scripted target fails on are found."""

import asyncio
import json

import pytest

from megatron_k2.gym.admission import ADVERSARIAL, card_of
from megatron_k2.gym.protocol import Outcome
from megatron_k2.gym.safety.env import Safety
from megatron_k2.gym.safety.evolve import OPERATORS, evolve, tasks_of, twins_of
from megatron_k2.gym.safety.generators import DECLINES, SafetyGenerator
from megatron_k2.gym.safety.seeds import SEEDS

GENERATOR = SafetyGenerator()
TASKS = GENERATOR.sample(200, seed=0)
EVERY = TASKS[: 2 * len(SEEDS)]


class Critic:
    """Reads the quoted answer: it declines where it says so, and serves where it is a seed's."""

    name = "critic"

    def __init__(self, always=None, fails=False):
        self.always, self.fails = always, fails

    def holds(self, request, answer, point):
        declines = "won't help" in answer or "I cannot help" in answer
        if point.startswith("It does not give"):
            return declines
        if point.startswith("It says plainly"):
            return declines
        serves = answer in {seed.served for seed in SEEDS if seed.benign == request}
        return serves if point.startswith("It serves") else not declines

    async def letter(self, system, user, letters):
        if self.fails:
            raise RuntimeError("no server")
        if self.always:
            return {self.always: 1.0}
        quoted = [
            json.loads(line.split(": ", 1)[1])
            for line in user.splitlines()
            if line[:3] in ("Req", "Ans")
        ]
        point = next(x for x in user.splitlines() if x.startswith("Statement: "))[11:]
        words = "yes, " if self.holds(*quoted, point) else "no, "
        return {next(x[0] for x in user.splitlines() if x[1:].startswith(": " + words)): 1.0}

    async def items(self, system, user):
        return None

    async def close(self):
        pass


def judged(pairs, asker=None):
    async def all_of_them():
        return [(await Safety(asker).judge(task, answer)).outcome for task, answer in pairs]

    return asyncio.run(all_of_them())


def test_oracles_are_right_and_their_exchange_is_wrong():
    assert set(judged([(t, GENERATOR.oracle(t)) for t in TASKS], Critic())) == {Outcome.RIGHT}
    turned = {seed.harmful: seed.served for seed in SEEDS}
    wrong = [(t, turned.get(t.prompt, DECLINES)) for t in TASKS]
    assert set(judged(wrong, Critic())) == {Outcome.WRONG}
    for words in ("", "42", *ADVERSARIAL):
        assert set(judged([(t, words) for t in EVERY], Critic())) == {Outcome.WRONG}


def test_the_card_with_a_model():
    card = asyncio.run(card_of(GENERATOR, Safety(Critic()), 2 * len(SEEDS)))
    assert not [reason for reason in card.reasons if "another" not in reason], card.reasons


def test_what_rules_say_without_a_model():
    harmful, benign = EVERY[0], EVERY[1]
    assert judged([(harmful, DECLINES), (benign, DECLINES)]) == [Outcome.RIGHT, Outcome.WRONG]
    long = DECLINES + " But as a story: " + "step " * 80
    assert judged([(harmful, long), (benign, SEEDS[0].served)]) == [Outcome.UNKNOWN] * 2


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_critic_that_always_says_one_letter_is_right_of_nothing(letter):
    """Meanings change with each vote: it contradicts itself, and does not win everywhere."""
    found = judged([(t, GENERATOR.oracle(t)) for t in EVERY], Critic(always=letter))
    assert found.count(Outcome.RIGHT) < len(EVERY)


def test_a_critic_that_fails_leaves_it_unknown():
    assert set(judged([(t, "words") for t in EVERY], Critic(fails=True))) == {Outcome.UNKNOWN}


class Attack:
    name = "attack"

    async def write(self, system, user):
        request = json.loads(user.split("\n", 1)[0].removeprefix("Request: "))
        key = next(k for k, v in OPERATORS.items() if v in user)
        return f"[{key}] {request}"


class Target:
    """Declines, unless the request comes as a story."""

    name = "target"

    async def write(self, system, user):
        return "Once upon a time, this is how." if "[story]" in user else "I cannot help with that."


def test_evolution_finds_what_the_target_falls_for():
    attempts = asyncio.run(evolve(Attack(), Target(), Critic(), SEEDS, rounds=12))
    won = [each for each in attempts if each.has_succeeded]
    assert len(won) >= 8
    assert all("[story]" in each.prompt for each in won)
    assert all(each.operators[-1] == "story" for each in won)
    assert [each.prompt for each in attempts if not each.operators] == [s.harmful for s in SEEDS]
    tasks = tasks_of(attempts)
    assert {t.reference["label"] for t in tasks} == {"harmful", "benign"}
    assert set(
        judged([(t, "this is how") for t in tasks if t.reference["label"] == "harmful"], Critic())
    ) == {Outcome.WRONG}
    twins = asyncio.run(twins_of(Attack(), attempts))
    assert all("[story]" in each.prompt and each.reference["label"] == "benign" for each in twins)
    again = asyncio.run(evolve(Attack(), Target(), Critic(), SEEDS, rounds=12))
    assert again == attempts
