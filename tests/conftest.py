"""What must not pass from one test file to the next: Megatron's class state, a compiled library."""

import sys

import pytest


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
