"""The collector over a model: the embedded engine in batch-invariant mode, weights that change.

Wrong variant: the engine's default mode, whose bits hang on who else is in the batch.
"""

import asyncio
from dataclasses import replace

import pytest

from megatron_k2.checkpoint.names.mapping import classic_from_transformers
from megatron_k2.engine.local.core import Core
from megatron_k2.engine.local.engine import LocalEngine
from megatron_k2.engine.protocol import Request, SamplingParams
from megatron_k2.rewards.budget import Budget
from megatron_k2.rl.task_sets import task_set_of
from tests.engine.local.models import TINY, reference, weights_of
from tests.rl.collecting import PLAN, Letters, made, tasks

PRESET = replace(TINY, vocab_size=Letters.vocab_size)
SETS = [
    task_set_of("one", tasks(6, 1), Budget(20)),
    task_set_of("three", tasks(4, 3), Budget(30)),
]
CALM = replace(PLAN, bounds=replace(PLAN.bounds, call_seconds=10))
"""Nothing hangs here, and a step of the model may hold the loop's thread for a while."""
NUM = 3


@pytest.fixture(scope="module")
def models():
    return [reference(PRESET, seed) for seed in range(NUM)]


class Run:
    """A collector over an engine of its own; iteration i with the i-th model's weights."""

    def __init__(self, models, folder, concurrency=8, is_batch_invariant=True):
        self.models = models
        core = Core(
            weights_of(models[0], PRESET), num_slots=8, max_length=256,
            is_batch_invariant=is_batch_invariant,
        )  # fmt: skip
        self.engine = LocalEngine(core)
        plan = replace(CALM, concurrency=concurrency)
        self.made = made(
            folder, plan=plan, engine=self.engine, sets=SETS, returns_routed_experts=True
        )

    async def _collect(self, number):
        named = classic_from_transformers(self.models[number].state_dict())
        await self.engine.update_weights(named.items(), str(number))
        return await self.made.collector.collect(number, number)

    def collect(self, numbers):
        return [asyncio.run(self._collect(number)) for number in numbers]

    def close(self):
        asyncio.run(self.engine.close())
        self.made.close()


def collected(models, folder, numbers=range(NUM), **more):
    run = Run(models, folder, **more)
    found = run.collect(numbers)
    run.close()
    return found


def handed_out(iterations):
    return [each.groups for each in iterations]


@pytest.fixture(scope="module")
def undisturbed(models, tmp_path_factory):
    return collected(models, tmp_path_factory.mktemp("undisturbed"))


def test_groups_are_the_same_bits_whatever_the_concurrency(models, tmp_path, undisturbed):
    assert handed_out(collected(models, tmp_path, concurrency=1)) == handed_out(undisturbed)


def test_groups_are_the_same_bits_after_restarts(models, tmp_path, undisturbed):
    found = [collected(models, tmp_path, [number])[0] for number in range(NUM)]
    assert handed_out(found) == handed_out(undisturbed)


def test_the_default_mode_is_found(models, tmp_path):
    found = [
        collected(models, tmp_path / str(n), [0], concurrency=n, is_batch_invariant=False)
        for n in (1, 8)
    ]
    assert handed_out(found[0]) != handed_out(found[1])


def answers(iterations):
    return [t for each in iterations for group in each.groups for t in group.trajectories]


def test_every_token_is_its_versions_and_has_its_routes(models, undisturbed):
    found = answers(undisturbed)
    assert any(len({s.weight_version for s in t.segments if s.is_sampled}) > 1 for t in found)
    for answer in found:
        lacking = [len(s.token_ids) - len(s.routes) for s in answer.segments]
        assert lacking == [0] * (len(lacking) - 1) + [1]
        for segment in answer.segments:
            assert not segment.routes or segment.routes.num_layers == PRESET.num_layers - 1


def test_log_probabilities_are_those_of_the_version_that_a_segment_names(models, undisturbed):
    """Scored again as prompts, by each version alone."""
    answer = max(answers(undisturbed), key=lambda t: len({s.weight_version for s in t.segments}))
    ids, wrong = answer.token_ids, 0
    for version in {s.weight_version for s in answer.segments if s.is_sampled}:
        core = Core(
            weights_of(models[version], PRESET),
            num_slots=1,
            max_length=256,
            is_batch_invariant=True,
        )
        core.add(Request("a", ids, SamplingParams(max_tokens=0, prompt_logprobs=0)))
        scored = []
        while core.has_work:
            scored += [token for _, output in core.step() for token in output.prompt_tokens]
        place = 0
        for segment in answer.segments:
            given = [token.logprob for token in scored[place : place + len(segment.token_ids)]]
            if segment.is_sampled and segment.weight_version == version:
                assert list(segment.logprobs) == given
            elif segment.is_sampled:
                wrong += list(segment.logprobs) != given
            place += len(segment.token_ids)
    assert wrong  # the other versions' are others
