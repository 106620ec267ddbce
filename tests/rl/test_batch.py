"""Plans and rows of batches by hand: masks, packs, shares of ranks."""

import random
from dataclasses import replace

import numpy as np
import pytest

from megatron_k2.errors import UserError
from megatron_k2.records.rollouts import End
from megatron_k2.rl.batch import IDLE, Room, Source, plan
from megatron_k2.rl.record import Group, Segment, Trajectory
from megatron_k2.rl.rows import rows
from megatron_k2.sft.packed_set import PackedSet
from tests.rl.recorded import group, iteration, lesson, stamped
from tests.sft.build_set import write_set

ROOM = Room(64)
READ = Segment((10, 11), routes=(((0,), (1,)), ((2,), (3,))))
FIRST = Segment((20, 21), (-1.0, -1.5), 1, 0.8, (((4,), (5,)), ((6,), (7,))))
TOOL = Segment((30,))
SECOND = Segment((40,), (-2.0,), 2, 1.0)
THIRD = Segment((50, 51), (-2.5, -3.0), 3, 0.5, (((1,), (2,)),))
THREE = Trajectory((READ, FIRST, TOOL, SECOND, THIRD), 1.0, {}, End.OVER)
SHORT = Trajectory((Segment((10, 11)), Segment((60,), (-1.0,), 3)), 0.0, {}, End.OVER)
GROUP = Group(0, "toy", "a", (THREE, SHORT))


def _rows(keeps_old):
    batch = plan([GROUP], ROOM, 3, keeps_old=keeps_old)
    (source,) = batch.shares[0]
    return batch, rows(source, ROOM, 3, keeps_old=keeps_old)


def test_three_versions_by_hand():
    """slime #1445. What row i reads is token i; what it is asked for, token i + 1."""
    batch, found = _rows(keeps_old=False)
    assert found.layout.bounds == (0, 7, 9, 64)
    assert found.tokens[:10].tolist() == [10, 11, 20, 21, 30, 40, 50, 10, 11, 0]
    assert found.labels[:10].tolist() == [11, 20, 21, 30, 40, 50, 51, 11, 60, 0]
    assert found.sample[:10].tolist() == [0] * 7 + [1, 1, 0]
    assert found.is_trained[:10].tolist() == [*[False] * 5, True, True, False, True, False]
    assert found.lengths.tolist() == [2, 1]
    assert batch.num_trained == 3
    kept_batch, kept = _rows(keeps_old=True)
    assert kept.is_trained.nonzero()[0].tolist() == [1, 2, 4, 5, 6, 8]
    assert kept.lengths.tolist() == [5, 1]
    assert kept_batch.num_trained == 6
    for each in (found, kept):
        assert each.is_current.nonzero()[0].tolist() == [5, 6, 8]
        assert each.behaviour[:9].tolist() == [0, -1, -1.5, 0, -2, -2.5, -3, 0, -1]
        assert each.temperature[:9].tolist() == pytest.approx([1, 0.8, 0.8, 1, 1, 0.5, 0.5, 1, 1])
        assert each.advantage.tolist() == [0.5, -0.5]
        assert each.weight.tolist() == [0.5, 0.5]
        assert not each.is_trained[9:].any()


def test_routes_lie_with_the_row_that_reads_the_token():
    found = _rows(keeps_old=False)[1].routes
    assert found.shape == (64, 2, 1)
    first = found[:7, :, 0].tolist()
    assert first == [[0, 1], [2, 3], [4, 5], [6, 7], [-1, -1], [-1, -1], [1, 2]]
    assert (found[7:] == -1).all()


def test_only_live_groups_are_packed_and_every_live_one_weighs_the_same():
    groups = stamped(iteration(), 0)
    batch = plan(groups, ROOM, 0)
    assert (batch.num_groups, batch.num_live_groups, batch.num_answers) == (4, 3, 11)
    answers = [answer for source in batch.shares[0] for answer in source.answers]
    assert len(answers) == 11
    assert sum(answer.weight for answer in answers) == pytest.approx(1)
    weights = sorted({answer.weight for answer in answers})
    assert weights == pytest.approx([1 / 12, 1 / 9])
    alone = plan([each for each in groups if each.is_live], ROOM, 0)
    assert alone.shares == batch.shares
    assert batch.num_trained == sum(answer.trajectory.num_sampled for answer in answers)


def test_without_a_live_group_nothing_is_packed_and_no_ptx_either(tmp_path):
    packs = PackedSet(write_set(tmp_path / "set"), "train", capacity=64)
    dead = stamped([group(0, (1, 1)), group(1, (0, None))], 0)
    batch = plan(dead, ROOM, 0, ptx=[packs[0]])
    assert not batch.is_live
    assert batch.shares == ((),)
    assert plan([], ROOM, 0).is_live is False
    # answers of older versions alone teach the sequence form nothing, and the token form something
    late = stamped([group(0, (1, 0), lags=(1, 1))], 5)
    assert not plan(late, ROOM, 5, ptx=[packs[0]]).is_live
    assert plan(late, ROOM, 5, keeps_old=True).is_live


def test_ranks_have_as_many_packs_and_about_as_many_tokens(tmp_path):
    packs = PackedSet(write_set(tmp_path / "set"), "train", capacity=64)
    groups = stamped([each for seed in range(6) for each in iteration(seed)], 0)
    for room in (Room(64, 3), Room(64, 2, 4, 4)):
        batch = plan(groups, room, 0, ptx=[packs[i] for i in range(3)])
        counts = {len(share) for share in batch.shares}
        assert len(counts) == 1
        assert counts.pop() % room.count_multiple == 0
        loads = [sum(source.num_tokens for source in share) for share in batch.shares]
        assert sum(loads) == batch.num_tokens
        assert max(loads) - min(loads) <= 64
        for share in batch.shares:
            for source in share:
                layout = rows(source, room, 0).layout
                assert all(bound % room.multiple == 0 for bound in layout.bounds)


def test_a_rank_with_fewer_packs_runs_rows_that_are_padding():
    batch = plan(stamped([group(0, (1, 0))], 0), Room(64, 2), 0)
    (_, (idle,)) = batch.shares
    assert idle is IDLE
    found = rows(idle, ROOM, 0)
    assert (found.position_ids == -1).all()
    assert not found.is_trained.any()
    assert not found.nll_weight.any()


def test_curated_rows_have_a_weight_and_no_answer(tmp_path):
    packs = PackedSet(write_set(tmp_path / "set"), "train", capacity=64)
    source = Source(dialogues=packs[0])
    found = rows(source, ROOM, 0)
    assert source.num_targets == (found.nll_weight > 0).sum() > 0
    assert source.num_tokens == (found.position_ids >= 0).sum()
    assert not found.is_trained.any()
    assert len(found.advantage) == 0
    targets = np.flatnonzero(found.nll_weight)
    assert (found.labels[targets] > 0).all()


def test_lessons_are_a_term_of_their_own(tmp_path):
    packs = PackedSet(write_set(tmp_path / "set"), "train", capacity=64)
    groups = stamped(iteration(), 0)
    batch = plan(groups, ROOM, 0, ptx=[packs[0]], lessons=[lesson(0), lesson(1)])
    assert batch.num_lesson_targets == 4
    assert batch.num_targets == batch.num_trained + batch.num_ptx_targets + 4
    taught = [source for source in batch.shares[0] if source.is_lesson]
    found = [rows(source, ROOM, 0) for source in taught]
    asked = sorted(
        int(each.labels[at]) for each in found for at in np.flatnonzero(each.lesson_weight)
    )
    ends = [int(t) for n in range(2) for t in lesson(n).tokens[np.cumsum(lesson(n).lengths) - 1]]
    assert asked == sorted(ends)
    assert not any(each.nll_weight.any() or each.is_trained.any() for each in found)
    dead = stamped([group(0, (1, 1))], 0)
    assert not plan(dead, ROOM, 0, lessons=[lesson(0)]).is_live


def test_what_does_not_fit_is_named():
    draw = random.Random(0)
    long = Segment(tuple(draw.randrange(1, 9) for _ in range(70)), (-1.0,) * 70, 0)
    answer = replace(SHORT, segments=(READ, long), reward=1.0)
    other = replace(SHORT, segments=(Segment((1,)), Segment((2,), (-1.0,), 0)))
    with pytest.raises(UserError, match=r"72 tokens.*--seq-length"):
        plan([Group(0, "toy", "a", (answer, other))], ROOM, 0)
    with pytest.raises(UserError, match="weight version 3, the trainer is at 2"):
        plan([GROUP], ROOM, 2)
