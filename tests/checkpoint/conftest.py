import pytest

from tests.support.distributed import run_ranks


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Directory with one torch_dist checkpoint per layout, made once by two gloo ranks."""
    out = tmp_path_factory.mktemp("megatron")
    run_ranks("tests.checkpoint.build_checkpoints", 2, str(out), out / "logs")
    return out
