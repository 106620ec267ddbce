"""Full-size ranks on the meta device against the closed form."""

import subprocess
import sys

import pytest

from megatron_k2.errors import UserError
from megatron_k2.planning.cost.memory import Parameters, rank_memory, rank_parameters
from megatron_k2.planning.schedule.chunks import distinct_ranks
from megatron_k2.training import dry_run as room
from megatron_k2.training.dry_run import dry_run, plan_optimizer
from tests.planning.cost.test_memory import request


@pytest.mark.slow
def test_every_distinct_rank_of_2048_is_built_as_planned():
    r = request(world=2048, vpp=2)
    built = list(dry_run(r))
    assert [b.ranks for b in built] == [(0,), tuple(range(1, 15)), (15,)]
    assert [b.layers for b in built] == [(1, 2), (2, 2), (2, 0)]
    ranks = [b.parameters for b in built for _ in b.ranks]
    total = sum(p.dense_muon + p.adamw + 16 * p.expert_muon for p in ranks)
    assert total == 1_026_408_209_408
    # an MoE layer has 5 + 1 + 3 + 3 x 24 matrices here, the dense layer 5 + 3
    assert [b.num_matrices for b in built] == [8 + 2 * 81, 4 * 81, 2 * 81]


@pytest.mark.slow
def test_tensor_parallel_shards_are_built_as_planned():
    r = request(preset="moonlight-16b-a3b", world=16, pp=4, tp=2, ep=4, vpp=2)
    for built in dry_run(r.replace(seq_length=8192, sequences_per_step=2048)):
        assert built.parameters == rank_parameters(r, built.ranks[0])


@pytest.mark.parametrize("world", [256, 2048])
def test_a_ranks_optimizer_states_are_the_planners_within_one_shard(world):
    """Ranks hold equal parts of a stage, of which one may have more of AdamW's than another."""
    r = request(world=world, vpp=2, optimizer_offload=0.85)
    planned = rank_memory(r, 1)
    found = plan_optimizer(r, tuple(range(1, 15)), 4 * 81, 6.0)
    largest_shard = 8 * 2 * 2048 * 7168
    assert found.on_host + found.on_device == pytest.approx(
        planned.optimizer + planned.optimizer_on_host, rel=2e-3
    )
    assert planned.optimizer_on_host * 0.998 <= found.on_host
    assert found.on_host < planned.optimizer_on_host * 1.002 + largest_shard
    assert found.imbalance < 1.05
    with pytest.raises(UserError, match="plans 324 matrices, the model has 323"):
        plan_optimizer(r, tuple(range(1, 15)), 323, 6.0)


def test_a_rank_that_is_not_what_was_planned_is_seen(monkeypatch):
    def without_norms(r, rank):
        found = rank_parameters(r, rank)
        return Parameters(found.dense_muon, found.expert_muon, found.adamw - 7168)

    monkeypatch.setattr(room, "rank_parameters", without_norms)
    with pytest.raises(UserError, match=r"pipeline rank 0: Megatron built .*, planned is"):
        next(dry_run(request(vpp=2)))


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--recompute-granularity", "full"], "refuses these flags"),
        (["--num-experts", "383"], "refuses these flags"),
        (["--pipeline-model-parallel-layout", "Et|tL"], "refuses these flags"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ],
)
def test_flags_that_megatron_refuses_are_answered_with_its_words(extra, words):
    with pytest.raises(UserError, match=words):
        next(dry_run(request(vpp=2), extra))


def test_ranks_alike_are_built_once():
    def alike(**layout):
        return distinct_ranks(request(**layout).chunks(), 1)

    assert len(alike(vpp=2)) == 3
    assert len(alike(vpp=1)) == 3
    assert sum(map(len, alike(pp=8, ep=32).values())) == 8


@pytest.mark.slow
def test_the_command_prints_what_it_built_in_two_gibibytes():
    argv = "plan --preset kimi-k2 --gpu h100 --world-size 2048 --dry-run".split()
    code = (
        "import resource; from megatron_k2.cli.main import main; "
        f"assert main({argv}) == 0; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "rank 1-14: 2+2 layers" in done.stdout
    assert "1,026,408,209,408 parameters, the model's own number" in done.stdout
    assert int(done.stdout.split()[-1]) < 2 * 2**20  # KiB
