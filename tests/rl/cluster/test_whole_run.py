"""A whole run over processes of its own against the same run in one program, bit for bit.

Two supervisors with an engine server each, a gym service, a controller, four gloo ranks (TP2 x
DP2): real processes, real servers, weights over shared memory. All that can die there is killed and
stopped by ``tests/campaigns/rl_cluster_faults.py``. Not exercised: several nodes, GPUs.
"""

import pytest

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
    with Cluster(tmp_path, ITERATIONS, gyms=1) as run:
        codes = run.wait()
        assert codes == [0] * NUM_RANKS, run.told()
        assert run.processes["controller"].wait(20) == 0, run.told()
        told = (run.logs / "rank0.log").read_text()
    assert differ(tmp_path / "out", alone) == "", told
