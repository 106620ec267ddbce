"""Subnormals are flushed while the CPU host is entered, for the tests that entered it alone."""

import pytest

from megatron_k2.host.cpu import cpu_host, flushes_subnormals


@pytest.fixture(scope="module")
def entered():
    with cpu_host():
        yield


@pytest.mark.usefixtures("entered")
def test_a_host_within_a_host_leaves_subnormals_flushed():
    assert flushes_subnormals()
    with cpu_host():
        assert flushes_subnormals()
    assert flushes_subnormals()


def test_a_neighbour_that_asks_for_no_host_keeps_its_subnormals():
    """``tests/conftest.py``; the host of the test above is still entered here."""
    assert not flushes_subnormals()
