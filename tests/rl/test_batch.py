"""Plans and rows of batches by hand: masks, packs, shares of ranks."""

import random
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest

from megatron_k2.errors import UserError
from megatron_k2.records.rollouts import End
from megatron_k2.records.routes import Routes
from megatron_k2.rl.batch import IDLE, Room, Source, plan
from megatron_k2.rl.learner import can_share_prompts
from megatron_k2.rl.record import Group, Segment, Trajectory
from megatron_k2.rl.rows import rows
from megatron_k2.sft.packed_set import PackedSet
from tests.rl.recorded import group, iteration, lesson, stamped
from tests.sft.build_set import write_set

ROOM = Room(64)
READ = Segment((10, 11), routes=Routes.of([[[0], [1]], [[2], [3]]]))
FIRST = Segment((20, 21), (-1.0, -1.5), 1, 0.8, Routes.of([[[4], [5]], [[6], [7]]]))
TOOL = Segment((30,))
SECOND = Segment((40,), (-2.0,), 2, 1.0)
THIRD = Segment((50, 51), (-2.5, -3.0), 3, 0.5, Routes.of([[[1], [2]]]))
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


ALIKE = replace(SHORT, segments=(READ, *SHORT.segments[1:]))
SHARING = replace(ROOM, shares_prompts=True)


def test_answers_share_all_rows_of_their_prompt_but_its_last_tokens_by_hand():
    """Of (10, 11) the row that reads 11 is asked for 20 by one answer, for 60 by the other."""
    batch = plan([replace(GROUP, trajectories=(THREE, ALIKE))], SHARING, 3)
    (source,) = batch.shares[0]
    found = rows(source, SHARING, 3)
    assert found.layout.bounds == (0, 1, 7, 8, 64)
    assert found.layout.beginnings == (-1, 0, 0, -1)
    assert found.tokens[:9].tolist() == [10, 11, 20, 21, 30, 40, 50, 11, 0]
    assert found.labels[:9].tolist() == [11, 20, 21, 30, 40, 50, 51, 60, 0]
    assert found.position_ids[:9].tolist() == [0, 1, 2, 3, 4, 5, 6, 1, -1]
    assert found.sample[:9].tolist() == [0] * 7 + [1, 0]
    assert found.is_trained[:9].tolist() == [*[False] * 5, True, True, True, False]
    assert found.behaviour[:8].tolist() == [0, -1, -1.5, 0, -2, -2.5, -3, -1]
    assert found.temperature[:8].tolist() == pytest.approx([1, 0.8, 0.8, 1, 1, 0.5, 0.5, 1])
    routes = [[0, 1], [2, 3], [4, 5], [6, 7], [-1, -1], [-1, -1], [1, 2], [2, 3]]
    assert found.routes[:8, :, 0].tolist() == routes
    assert (batch.num_tokens, batch.num_saved, source.num_tokens) == (8, 1, 8)


def test_a_prompt_that_was_routed_otherwise_is_not_shared():
    batch = plan([GROUP], SHARING, 3)  # of one the routes are known, of the other not
    assert [len(each.answers) for each in batch.shares[0][0].bundles] == [1, 1]
    assert batch.num_saved == 0


def test_answers_that_do_not_fit_one_pack_share_in_several():
    """40 rows of a prompt and 4 of each of eight answers: five, then three, in packs of 60."""
    prompt = Segment(tuple(range(1, 42)))
    answers = tuple(
        Trajectory((prompt, Segment((7,) * 4, (-1.0,) * 4, 0)), k % 2, {}, End.OVER)
        for k in range(8)
    )
    batch = plan([Group(0, "toy", "a", answers)], Room(60, shares_prompts=True), 0)
    bundles = [each for source in batch.shares[0] for each in source.bundles]
    assert sorted(len(each.answers) for each in bundles) == [3, 5]
    assert {each.num_shared for each in bundles} == {40}
    assert batch.num_tokens == 2 * 40 + 8 * 4
    assert batch.num_saved == 6 * 40
    own = plan([Group(0, "toy", "a", answers)], Room(60), 0)
    assert own.num_tokens == batch.num_tokens + batch.num_saved == 8 * 44


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("transformer_impl", "transformer_engine"),
        ("apply_rope_fusion", True),
        ("context_parallel_size", 2),
        ("mtp_num_layers", 1),
    ],
)
def test_prompts_are_shared_where_every_part_of_the_model_can(name, value):
    args = Namespace(
        transformer_impl="local",
        apply_rope_fusion=False,
        context_parallel_size=1,
        mtp_num_layers=None,
    )
    assert can_share_prompts(args)
    setattr(args, name, value)
    assert not can_share_prompts(args)


def test_a_group_is_divided_where_packs_would_else_stay_half_empty():
    """Three groups of 10 + 3 * 10 rows, packs of 60: 40 and 10 + 10, 10 + 20 twice, 10 + 10."""
    prompts = [Segment(tuple(range(k, k + 11))) for k in (1, 20, 40)]
    groups = [
        Group(
            n,
            "toy",
            str(n),
            tuple(
                Trajectory((each, Segment((7,) * 10, (-1.0,) * 10, 0)), k % 2, {}, End.OVER)
                for k in range(3)
            ),
        )
        for n, each in enumerate(prompts)
    ]
    batch = plan(groups, Room(60, shares_prompts=True), 0)
    used = [source.num_tokens for source in batch.shares[0]]
    assert used == [60, 60, 20]
    bundles = [each for source in batch.shares[0] for each in source.bundles]
    assert [len(each.answers) for each in bundles] == [3, 1, 2, 2, 1]
    assert [each.num_shared for each in bundles] == [10, 0, 10, 10, 0]


def test_packs_end_where_the_fullest_of_all_ranks_does():
    groups = stamped([each for seed in range(3) for each in iteration(seed)], 0)
    batch = plan(groups, Room(200, 2, shares_prompts=True, unit=64), 0)
    pairs = list(zip(*batch.shares, strict=True))
    assert len(batch.sizes) == len(pairs)
    for size, pair in zip(batch.sizes, pairs, strict=True):
        assert size % 64 == 0 or size == 200
        assert size - 64 < max(source.num_tokens for source in pair) <= size
    assert min(batch.sizes) < 200
    assert set(plan(groups, Room(200, 2), 0).sizes) == {200}
    idle = plan(groups[:1], Room(200, 2, unit=64), 0)
    assert idle.sizes == (128,)
    assert [rows(share[0], Room(128), 0).layout.num_rows for share in idle.shares] == [128, 128]


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
