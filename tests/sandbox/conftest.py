import pytest

from megatron_k2.sandbox.choose import SANDBOXES, STRONGEST_FIRST
from megatron_k2.sandbox.protocol import Backend


@pytest.fixture(params=STRONGEST_FIRST)
def confining(request: pytest.FixtureRequest) -> Backend:
    """Each back-end that can run here."""
    backend = SANDBOXES[request.param]()
    if problem := backend.missing():
        pytest.skip(f"{request.param}: {problem}")
    return backend


@pytest.fixture(params=[name for name, made in SANDBOXES.items() if made().starts_here])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each back-end that can run here, bare too: for programs that mean no harm."""
    found = SANDBOXES[request.param]()
    if problem := found.missing():
        pytest.skip(f"{request.param}: {problem}")
    return found
