"""What Megatron keeps in its classes must not pass from one test file to the next."""

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
