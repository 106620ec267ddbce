"""What the controller and the trainer refuse of their flags before anything is started."""

import json

import pytest

from megatron_k2.errors import UserError
from megatron_k2.rl.cluster.given import given
from megatron_k2.rl.flags import expand
from megatron_k2.rl.train import RL
from megatron_k2.run.flags import read_flags
from tests.rl.cluster.running import Cluster, flags


@pytest.fixture
def engines(tmp_path):
    path = tmp_path / "engines.json"
    row = {"backend": "vllm", "replicas": 1, "gpus_per_node": 8, "model": {"preset": "k2-tiny"}}
    path.write_text(json.dumps(row))
    return path


def check(folder, *more):
    RL.check(read_flags(expand(flags(folder, 2, *more), cuda=False)), 4)


def test_the_controller_reads_the_trainers_flags(tmp_path):
    run = Cluster(tmp_path, 2, gyms=1)
    found = given(run.words)
    assert (found.args.gym, found.args.seed, found.args.save) == (1, 7, str(tmp_path / "out"))
    assert found.meeting.generation == run.meeting.generation
    assert (found.vocab_size, found.basis.plan.group_size) == (4096, 4)
    assert [each.name for each in found.basis.sets] == ["letters"], "made by whoever is first"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (flags, "missing --meet DIR"),
        (lambda folder, n: flags(folder, n, "--meet", "x")[2:], "missing --vocab-size"),
    ],
)
def test_a_controller_without_what_it_needs_is_refused(tmp_path, words, said):
    with pytest.raises(UserError, match=said):
        given(words(tmp_path, 2))


def test_engines_elsewhere_need_a_place_to_meet(tmp_path, engines):
    check(tmp_path)
    check(tmp_path, "--meet", str(tmp_path), "--engines", str(engines))
    with pytest.raises(UserError, match="--meet without --engines"):
        check(tmp_path, "--meet", str(tmp_path))
    with pytest.raises(UserError, match="--engines without --meet"):
        check(tmp_path, "--engines", str(engines))
    with pytest.raises(UserError, match=r"--engines none\.json: No such file"):
        check(tmp_path, "--meet", str(tmp_path), "--engines", "none.json")


def test_engines_on_the_trainers_gpus_need_its_memory(tmp_path):
    shared = ["--meet", str(tmp_path), "--engines", str(tmp_path / "shared.json")]
    row = {"backend": "local", "replicas": 1, "model": {"preset": "k2-tiny"}, "colocated": True}
    (tmp_path / "shared.json").write_text(json.dumps(row))
    with pytest.raises(UserError, match=r"says colocated.*give --offload-in-rollout too"):
        check(tmp_path, *shared)
    check(tmp_path, *shared, "--offload-in-rollout")
