"""A policy of two ways to answer sums, and a linear critic that at first likes the worse one.

*Careful* answers are right four times of five; *bluffing* ones once in five, and they say that they
were checked, which the critic took for a sign of truth. It can also see whether the last digit
fits, which all right answers and few wrong ones do.
"""

import math
import random

import numpy as np
import torch

from megatron_k2.records.rollouts import End
from megatron_k2.rewards.judge import Opinion
from megatron_k2.rewards.rubric import RubricReward
from megatron_k2.rl.critic import Refresher, Schedule, on_policy_pairs
from megatron_k2.rl.objective import advantages
from megatron_k2.rl.record import Group, Segment, Trajectory

K, PROMPTS, STEPS, RATE = 8, 16, 20, 1.5
RIGHT = {"careful": 0.8, "bluff": 0.2}
SAYS = {
    "careful": " I wrote it down as plainly as I could.",
    "bluff": " I checked it twice, and the sum agrees.",
}
"""Of one length, so that no correction for length helps."""


def answer(order, way, a, b):
    is_right = order.random() < RIGHT[way]
    value = a + b if is_right else a + b + order.choice((1, 2, 3, 10, -1))
    text = f"The sum of {a} and {b} is {value}.{SAYS[way]}"
    return text + f" Draw {order.randrange(10**6)}.", float(is_right)


class LinearCritic:
    """P(first better) by the difference of two features; refreshed by a few Newton steps."""

    name = "linear"
    PRIOR = 4.0

    def __init__(self):
        self.weights = np.array([2.0, 0.3])

    @staticmethod
    def features(prompt, text):
        a, b = (int(x) for x in prompt.split() if x.isdigit())
        value = int(text.split(" is ")[1].split(".")[0])
        return np.array([float("checked" in text), float(value % 10 == (a + b) % 10)])

    def strength(self, prompt, text):
        return float(self.weights @ self.features(prompt, text))

    async def compare(self, question):
        first, second = (
            self.strength(question.prompt, t) for t in (question.first, question.second)
        )
        odds = first - second
        return Opinion(1 / (1 + math.exp(-odds)), 0)

    async def learn(self, pairs):
        rows = np.array(
            [self.features(p.prompt, p.best) - self.features(p.prompt, p.worst) for p in pairs]
        )
        before = self.weights.copy()
        for _ in range(20):
            p = 1 / (1 + np.exp(-rows @ self.weights))
            slope = rows.T @ (1 - p) - (self.weights - before) / self.PRIOR
            curve = (rows * (p * (1 - p))[:, None]).T @ rows + np.eye(2) / self.PRIOR
            self.weights = self.weights + np.linalg.solve(curve, slope)


def group_of(ordinal, answers):
    made = [
        Trajectory(
            (Segment((1,)), Segment((2,), (-1.0,), 0)),
            verdict,
            {"verdict": verdict},
            End.OVER,
            text,
        )
        for text, verdict in answers
    ]
    return Group(ordinal, "sums", str(ordinal), tuple(made))


async def trained(seed, *, refreshes):
    """Proxy and gold reward by step, and what each refresh measured."""
    order, critic, logit = random.Random(seed), LinearCritic(), 0.0
    refresher, schedule = Refresher(critic), Schedule(every=4)
    proxies, golds, measured, pairs = [], [], [], []
    for step in range(STEPS):
        slope, groups, prompts = 0.0, [], {}
        proxy, gold = [], []
        for number in range(PROMPTS):
            a, b = order.randint(10, 99), order.randint(10, 99)
            prompt = f"What is {a} plus {b} ?"
            share = 1 / (1 + math.exp(-logit))
            ways = ["bluff" if order.random() < share else "careful" for _ in range(K)]
            answers = [answer(order, way, a, b) for way in ways]
            found = await RubricReward(critic, schedule="ring", seed=step).score(
                prompt, [text for text, _ in answers]
            )
            rewards = torch.tensor([each.correctness for each in found.rewards])
            values = advantages(rewards, torch.zeros(K, dtype=torch.long)).values.tolist()
            slope += sum(
                v * ((way == "bluff") - share) for v, way in zip(values, ways, strict=True)
            )
            ordinal = step * PROMPTS + number
            groups.append(group_of(ordinal, answers))
            prompts[ordinal] = prompt
            proxy += [critic.strength(prompt, text) for text, _ in answers]
            gold += [verdict for _, verdict in answers]
        logit += RATE * slope / PROMPTS
        proxies.append(sum(proxy) / len(proxy))
        golds.append(sum(gold) / len(gold))
        pairs += on_policy_pairs(
            groups, lambda g, asked=prompts: asked[g.ordinal], lambda t: t.reason
        )
        if refreshes and (lesson := schedule.training(step, pairs[-300:])):
            await refresher.begin(pairs[-300:])
            await critic.learn(lesson)
            measured.append(await refresher.end())
    return proxies, golds, measured
