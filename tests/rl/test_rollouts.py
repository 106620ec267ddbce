"""What an iteration hands out: which groups, of which weights, whatever is slow, hangs or dies.

The engine is a hash; ``test_collect_local.py`` has a model. Wrong variants stand beside what they
would break: a ledger that goes on at its newest ordinal, one that forgets what was cut off.
"""

import asyncio
import json
import math
from collections import Counter
from dataclasses import replace

import pytest

from megatron_k2.engine.protocol import EngineError, Health
from megatron_k2.errors import UserError
from megatron_k2.records.rollouts import End
from megatron_k2.rewards.budget import Budget
from megatron_k2.rl.collected import metrics, repeats
from megatron_k2.rl.cut import Clock, Cut, Settled
from megatron_k2.rl.ledger import Ledger
from megatron_k2.rl.objective import advantages
from megatron_k2.rl.plan import Plan
from megatron_k2.rl.task_sets import task_set_of
from tests.rl.collecting import PLAN, DrawingEngine, Talk, Talking, made, tasks, two_sets

NUM = 8


def handed_out(iterations):
    """All that was handed out."""
    return [each.groups for each in iterations]


def collected(folder, number=NUM, **more):
    m = made(folder, **more)
    found = [m.collect(i) for i in range(number)]
    m.close()
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return collected(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("concurrency", [1, 8, 64])
def test_which_groups_come_out_hangs_on_no_speed(tmp_path, undisturbed, concurrency):
    plan, engine = replace(PLAN, concurrency=concurrency), DrawingEngine(jitter=0.0005)
    assert handed_out(collected(tmp_path, plan=plan, engine=engine)) == handed_out(undisturbed)


class WallClock(Clock):
    """Ends where so many groups are whole by the clock on the wall."""

    def _latest_end(self):
        return -math.inf

    def settled(self):
        return 0, [Settled(run.steps, run.is_finished) for run in self._runs]


def test_a_cut_by_the_clock_on_the_wall_is_found(tmp_path, undisturbed, monkeypatch):
    monkeypatch.setattr("megatron_k2.rl.rollouts.Clock", WallClock)
    plans = [replace(PLAN, concurrency=concurrency) for concurrency in (1, 8)]
    one, eight = (collected(tmp_path / str(p.concurrency), plan=p) for p in plans)
    assert handed_out(one) != handed_out(eight)


def test_other_slots_seeds_and_weights_give_others(tmp_path, undisturbed):
    for name, changed in {
        "slots": {"plan": replace(PLAN, cut=Cut(2, 3))},
        "seed": {"seed": 6},
        "weights": {"engine": DrawingEngine("other")},
    }.items():
        assert handed_out(collected(tmp_path / name, **changed)) != handed_out(undisturbed)


def ordinals(iterations):
    return [group.ordinal for each in iterations for group in each.groups]


def test_no_prompt_is_trained_on_twice_and_none_is_lost(undisturbed):
    found = ordinals(undisturbed)
    assert len(set(found)) == len(found)
    assert max(Counter(found).values()) == 1
    for each in undisturbed:
        assert ordinals([each]) == sorted(ordinals([each]))
        assert len(each.groups) >= PLAN.cut.num_groups
    missing = set(range(max(found))) - set(found)
    assert len(missing) <= PLAN.groups_in_play - PLAN.cut.num_groups  # those that are in play


def test_slime_1445_tokens_of_three_versions_carry_the_version_that_drew_them(undisturbed):
    answers = [t for each in undisturbed for group in each.groups for t in group.trajectories]
    versions = [
        [each.weight_version for each in answer.segments if each.is_sampled] for answer in answers
    ]
    assert any(len(set(each)) >= 3 for each in versions)
    assert all(each == sorted(each) for each in versions)
    for iteration in undisturbed:
        last = [v for g in iteration.groups for t in g.trajectories for s in t.segments[-1:]
                for v in [s.weight_version]]  # fmt: skip
        assert max(last) == iteration.version


@pytest.mark.parametrize("stops", [(3,), (1, 2, 5)])
def test_openrlhf_1322_vime_324_unfinished_segments_survive(tmp_path, undisturbed, stops):
    found = []
    for begin, end in zip((0, *stops), (*stops, NUM), strict=True):
        m = made(tmp_path)
        found += [m.collect(i) for i in range(begin, end)]
        m.close()
    assert handed_out(found) == handed_out(undisturbed)


class WithoutSegments(Ledger):
    def read_state(self, ref):
        return ()


def test_a_ledger_that_forgets_what_was_cut_off_is_found(tmp_path, undisturbed):
    assert handed_out(collected(tmp_path, ledger_class=WithoutSegments)) != handed_out(undisturbed)


class FromTheNewest(Ledger):
    """NeMo-RL's fault: goes on behind the newest prompt."""

    def __init__(self, *more):
        super().__init__(*more)
        self.open_groups = {}


def restarted(folder, ledger_class):
    """Every iteration in a process of its own, and then all that is open trained on as well."""
    found = []
    for number in range(NUM):
        m = made(folder, ledger_class=ledger_class)
        found.append(m.collect(number))
        m.close()
    plan = replace(PLAN, cut=Cut(PLAN.groups_in_play, 8))
    m = made(folder, plan=plan, ledger_class=ledger_class)
    found.append(m.collect(NUM))
    return ordinals(found), m.ledger.next_ordinal


def test_nemo_rl_3599_the_multiset_of_prompts_is_unchanged_by_restarts(tmp_path):
    found, number = restarted(tmp_path / "right", Ledger)
    assert sorted(found) == list(range(number))
    skipped, number = restarted(tmp_path / "wrong", FromTheNewest)
    assert sorted(skipped) != list(range(number))


def test_a_learner_that_is_behind_gets_the_same_groups_again(tmp_path, undisturbed):
    collected(tmp_path)
    m = made(tmp_path)
    again = [m.collect(i) for i in range(2, NUM)]
    assert handed_out(again) == handed_out(undisturbed[2:])
    assert all(each.is_replayed for each in again)
    assert not m.engine.requests
    assert not m.collect(NUM).is_replayed


def test_another_learner_is_refused(tmp_path):
    m = made(tmp_path)
    m.collect(0)
    with pytest.raises(UserError, match="version 0, and the learner is at 7"):
        m.collect(0, version=7)
    with pytest.raises(UserError, match="the ledger has 1; ask for 1 first"):
        m.collect(2)
    m.engine.set("", 4)
    with pytest.raises(UserError, match="holds weights of version '4', not 5"):
        asyncio.run(m.collector.collect(1, 5))


def hanging(number, good=0):
    return [task_set_of("all", [*tasks(number, 2, hangs=True), *tasks(good, 1)], Budget(40))]


def test_verl_7155_an_environment_that_never_returns_is_a_recorded_failure_in_time(tmp_path):
    plan = replace(PLAN, cut=Cut(3, 16), groups_in_play=3)
    m = made(tmp_path, plan=plan, sets=hanging(1, 2))
    found = m.collect(0)
    assert len(found.groups) == 3
    failed = [t for group in found.groups for t in group.trajectories if t.reward is None]
    assert len(failed) == 3
    assert {each.end for each in failed} == {End.ENVIRONMENT}
    assert all("step took more than 0.5 seconds" in each.reason for each in failed)
    assert all(each.num_sampled for each in failed)
    assert m.domain.num_environments == 6 + 2 * 3  # played once more, with what was drawn
    assert metrics(found)["rl/failed/environment"] == 3
    m.close()
    other = Talking(lambda: Talk())
    again = made(tmp_path, plan=plan, sets=hanging(1, 2), domain=other)
    assert handed_out([again.collect(0)]) == handed_out([found])
    assert other.num_environments == 0  # not decided again


def test_slime_657_what_failed_is_in_no_denominator_and_a_dead_group_is_none(tmp_path):
    import torch

    class Failing(Talk):
        async def verify(self):
            if "3" in "".join(self.said):
                raise OSError("the verifier is gone")
            return await super().verify()

    found = collected(tmp_path, domain=Talking(Failing))
    groups = [group for each in found for group in each.groups]
    failed = [t for group in groups for t in group.trajectories if t.reward is None]
    assert failed
    assert all(t.parts == {} for t in failed)
    judged = [(g.ordinal, t.reward) for g in groups for t in g.judged]
    rewards = torch.tensor([reward for _, reward in judged], dtype=torch.float64)
    numbers = advantages(rewards, torch.tensor([number for number, _ in judged]))
    assert numbers.num_live_groups == sum(group.is_live for group in groups) > 0
    live = {group.ordinal for group in groups if group.is_live}
    assert {n for (n, _), w in zip(judged, numbers.weights.tolist(), strict=True) if w} == live
    one = metrics(found[0])
    rates = [not group.is_live for group in found[0].groups]
    assert one["rl/dead_groups"] == sum(rates) / len(rates)


def test_an_answer_over_its_budget_is_cut_and_pays(undisturbed):
    sets = {each.name: each for each in two_sets()}
    cut = 0
    for group in (group for each in undisturbed for group in each.groups):
        budget = sets[group.task_set].budget
        for answer in group.trajectories:
            assert answer.num_sampled <= budget.max_tokens
            if answer.end is End.TOKENS:
                cut += 1
                assert answer.num_sampled == budget.max_tokens
                assert answer.reward == answer.parts["verdict"] - budget.penalty
            elif answer.reward is not None:
                assert answer.reward == answer.parts["verdict"]
    assert cut


def test_decode_steps_end_an_iteration_that_has_no_whole_group(tmp_path):
    plan = replace(PLAN, cut=Cut(4, 12, num_steps=2))
    m = made(tmp_path, plan=plan)
    found = [m.collect(i) for i in range(12)]
    assert all(each.facts["num_steps"] <= 2 for each in found)
    assert not found[0].groups
    assert max(len(each.groups) for each in found) > 0
    assert all(each.facts["num_tokens"] <= 2 * 12 for each in found)


def test_an_engine_that_dies_takes_nothing_that_was_finished(tmp_path, undisturbed):
    class Dying(DrawingEngine):
        num_left = 50

        async def generate(self, request):
            async for output in super().generate(request):
                self.num_left -= 1
                if self.num_left <= 0:
                    raise EngineError("out of memory")
                yield output

        def health(self):
            return Health(self.num_left > 0, "dead", False, self._version, 0, 0)

    engine = Dying()
    m = made(tmp_path, engine=engine)
    with pytest.raises(EngineError, match="out of memory"):
        m.collect(0)
    finished = {f"{n}/{k}" for n, row in m.ledger.finished.items() for k in row}
    assert finished
    with pytest.raises(EngineError, match="dead"):
        m.collect(0)
    engine.num_left, engine.requests = 10**9, []  # mended
    found = [m.collect(i) for i in range(NUM)]
    assert handed_out(found) == handed_out(undisturbed)
    assert finished.isdisjoint(each.id.rpartition("/")[0] for each in engine.requests)


def test_what_would_never_end_is_refused():
    with pytest.raises(UserError, match="groups_in_play=2 is less than the 3"):
        Plan(4, Cut(3, 8), 2)


def test_domains_and_judges_must_be_there(tmp_path):
    from megatron_k2.rl.rollouts import Collector

    m = made(tmp_path)
    stream = m.collector._stream
    with pytest.raises(UserError, match="domain 'talk' is not open"):
        Collector(PLAN, stream, m.speaker, {}, m.ledger)
    first = next(iter(stream.task_sets.values()))
    stream.task_sets[first.name] = replace(first, reward="rubric")
    with pytest.raises(UserError, match="rewarded by a rubric; give its judge"):
        Collector(PLAN, stream, m.speaker, {"talk": m.domain}, m.ledger)


def test_metrics_count_what_there_is(undisturbed):
    for each in undisturbed:
        found = metrics(each)
        answers = [t for group in each.groups for t in group.judged]
        drawn = [s for t in answers for s in t.segments if s.is_sampled]
        number = sum(len(s.token_ids) for s in drawn)
        older = sum(len(s.token_ids) for s in drawn if s.weight_version < each.version)
        assert found["rl/older_tokens"] == pytest.approx(older / number)
        assert found["rl/surprise"] == pytest.approx(-sum(sum(s.logprobs) for s in drawn) / number)
        json.dumps(found, allow_nan=False)


def test_text_that_repeats_itself_is_told():
    assert repeats([1, 2, 3, 4] * 10)
    assert not repeats(list(range(40)))
    assert not repeats([1, 2])
