"""Variables of torchrun: whole, absent, or left over from another launcher."""

import json

import pytest

from megatron_k2.cli.main import main
from megatron_k2.errors import UserError
from megatron_k2.host.torchrun import ENDED, is_rank, launch
from tests.support.paths import REPOSITORY

WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    def put(variables):
        for name in (*WHOLE, "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_process_that_torchrun_started_is_a_rank(environment, num_processes):
    environment(WHOLE)
    assert is_rank(num_processes)


@pytest.mark.parametrize(
    "left", [{}, {"WORLD_SIZE": "4"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}]
)
def test_a_shell_without_a_rank_is_none(environment, left):
    environment(left)
    assert not is_rank(2)


@pytest.mark.parametrize(
    ("variables", "num_processes", "said"),
    [
        ({"RANK": "0"}, 1, "RANK=0 is set without WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, 1, "without MASTER_ADDR, MASTER_PORT"),
        (WHOLE | {"RANK": "2"}, 1, "RANK=2, WORLD_SIZE=2: expected a rank below"),
        (WHOLE, 4, "--nproc 4, but RANK=0 and WORLD_SIZE=2"),
    ],
)
def test_what_is_left_over_is_refused_by_name(environment, variables, num_processes, said):
    environment(variables)
    with pytest.raises(UserError, match=said):
        is_rank(num_processes)


def test_the_command_refuses_it_in_a_line(environment, capsys):
    environment({"RANK": "0"})
    assert main(["pretrain", "--preset", "k2-tiny", "--mock-data"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.dist
@pytest.mark.parametrize("rank", ["0", "1", "all"])
def test_an_input_that_a_rank_refuses_is_one_sentence_and_code_2(environment, capfd, rank):
    environment({"PYTHONPATH": str(REPOSITORY)})
    assert launch("tests.host.refusing_rank", ["refuses", rank], 2) == 2
    assert capfd.readouterr().err == "program: no such thing; take another\n"


@pytest.mark.dist
@pytest.mark.parametrize("rank", ["1", "all"])
def test_a_rank_that_ends_on_purpose_has_said_why_and_the_code_is_its_own(environment, capfd, rank):
    environment({"PYTHONPATH": str(REPOSITORY)})
    assert launch("tests.host.refusing_rank", ["ends", rank], 2) == 7
    assert capfd.readouterr().err == ""


@pytest.mark.dist
def test_a_rank_that_crashes_is_reported_by_torchrun(environment, capfd):
    environment({"PYTHONPATH": str(REPOSITORY)})
    assert launch("tests.host.refusing_rank", ["crashes", "1"], 2) == 1
    assert "exitcode  : 7" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ({0: -15, 1: 2}, 2),
        ({0: 2, 1: 2}, 2),
        ({0: 3, 1: 3}, 3),
        ({0: 1, 1: 2}, None),  # 1 is a crash's
        ({0: -15, 1: 1}, None),
        ({0: 2, 1: 3}, None),
    ],
)
def test_a_crash_beside_a_purpose_is_a_crash(tmp_path, codes, code):
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from megatron_k2.host.agent import ended

    failures = {}
    for rank, own in codes.items():
        path = tmp_path / f"{rank}.json"
        if own > 1:
            seen = {"message": "no", "extraInfo": {"timestamp": "1"}}
            path.write_text(json.dumps({"message": seen, ENDED: own}))
        failures[rank] = ProcessFailure(rank, 1000 + rank, own, str(path))
    assert ended(failures) == code
