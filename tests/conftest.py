"""What must not pass from one test to the next: flushed subnormals, Megatron's class state, C."""

import sys

import pytest

HOSTS: set[tuple[str, str]] = set()
"""(file or folder, name) of the fixtures that leave the CPU host entered."""


def _flushes() -> bool:
    if "torch" not in sys.modules:
        return False
    from megatron_k2.host.cpu import flushes_subnormals

    return flushes_subnormals()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef):
    """Note which fixtures enter the CPU host."""
    before = _flushes()
    result = yield
    if _flushes() and not before:
        HOSTS.add((fixturedef.baseid, fixturedef.argname))
    return result


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A host that a neighbour of this file entered is not this test's, whatever came first."""
    before = _flushes()
    is_on_host = any(
        name in pyfuncitem.fixturenames and pyfuncitem.nodeid.startswith(place)
        for place, name in HOSTS
    )
    if before and not is_on_host:
        sys.modules["torch"].set_flush_denormal(False)
    try:
        return (yield)
    finally:
        if _flushes() != before:
            sys.modules["torch"].set_flush_denormal(before)


@pytest.fixture(scope="module", autouse=True)
def _forget_megatrons_moe_globals():
    """A backward without a schedule leaves a scale of shape [], the schedules copy [1] into it."""
    yield
    moe = sys.modules.get("megatron.core.transformer.moe.moe_utils")
    if moe is not None:
        moe.MoEAuxLossAutoScaler.main_loss_backward_scale = None
    logging = sys.modules.get("megatron.core.transformer.moe.moe_logging")
    if logging is not None:  # has as many rows as the first model had layers
        logging.destroy_moe_metrics_tracker()


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """A cache of this test's own for compiled C, and the library forgotten before and after."""
    from megatron_k2.fp8 import native

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    yield tmp_path
    native.library.cache_clear()
