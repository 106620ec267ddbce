"""What the domains that run programs share."""

import pytest

from megatron_k2.sandbox.choose import SANDBOXES, STRONGEST_FIRST


@pytest.fixture(scope="session")
def backend():
    """The strongest sandbox that there is here."""
    reasons = []
    for name in STRONGEST_FIRST:
        found = SANDBOXES[name]()
        if not (problem := found.missing()):
            return found
        reasons.append(f"{name}: {problem}")
    pytest.skip("; ".join(reasons))
