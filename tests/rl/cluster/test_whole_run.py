"""A whole run over processes of its own against the same run in one program, bit for bit.

Two supervisors with an engine server each, a gym service, a controller, four gloo ranks (TP2 x
DP2): real processes, real servers, weights over shared memory. All that can die there is killed and
stopped by ``tests/campaigns/rl_cluster_faults.py``. Not exercised: several nodes, GPUs.
"""

import shutil
import signal

import pytest

from megatron_k2.rl.waiting import EXIT_CODE
from megatron_k2.run.iterations import TRACKER
from tests.campaigns.rl_cluster_faults import signal_while_held, wait_for
from tests.campaigns.rl_sigkill import differ
from tests.rl.cluster.running import NUM_RANKS, Cluster, local

ITERATIONS = 3

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    local(folder, ITERATIONS)
    return folder / "out"


def test_a_cluster_learns_what_one_program_does(alone, tmp_path):
    shutil.copytree(alone.parent / "data", tmp_path / "data")
    with Cluster(tmp_path, ITERATIONS, gyms=1) as run:
        codes = run.wait()
        assert codes == [0] * NUM_RANKS, run.told()
        assert run.processes["controller"].wait(20) == 0, run.told()
        told = (run.logs / "rank0.log").read_text()
    assert differ(tmp_path / "out", alone) == "", told


def test_who_dies_is_replaced_or_the_run_is_started_again_and_nothing_is_lost(alone, tmp_path):
    """An engine, which gets weights during the rollout; then the controller, while ranks learn."""
    shutil.copytree(alone.parent / "data", tmp_path / "data")
    with Cluster(tmp_path, ITERATIONS, gyms=1) as run:
        wait_for(run, "collect")
        signal_while_held(run, "engine.0", signal.SIGKILL)
        wait_for(run, "train")
        run.send("controller", signal.SIGKILL)
        assert run.wait() == [EXIT_CODE] * NUM_RANKS, run.told()
        said = (tmp_path / "out" / "logs" / "rank3.log").read_text()
        assert "rank 0 failed: the controller (host 127.0.0.1, pid" in said
    with Cluster(tmp_path, ITERATIONS, start=1, gyms=1) as run:
        assert run.wait() == [0] * NUM_RANKS, run.told()
    assert differ(tmp_path / "out", alone) == ""
    other = shutil.copytree(alone, tmp_path / "other")
    (other / TRACKER).write_text("2")
    assert "tensors differ" in differ(other, alone), "an earlier checkpoint would be seen"
