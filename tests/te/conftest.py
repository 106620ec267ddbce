"""Transformer Engine's Python on stand-ins, in an environment of its own: ``make test-te``.

Once TE is importable Megatron switches to it everywhere, so it must stay out of the environment of
the other tests. Without it these tests skip.
"""

import pytest

from megatron_k2.compat import installed_version

if installed_version("transformer-engine") is not None:
    from megatron_k2.fp8.compute import choose_scale_format
    from tests.te.standin import install

    choose_scale_format("blockwise")
    install()


@pytest.fixture(scope="session", autouse=True)
def _transformer_engine():
    if installed_version("transformer-engine") is None:
        pytest.skip("Transformer Engine's Python is not in this environment; run make test-te")
