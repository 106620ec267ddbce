"""Transformer Engine's Python on stand-ins, in an environment of its own: ``make test-te``.

Once TE is importable Megatron switches to it everywhere, so it must stay out of the environment of
the other tests. Without it these tests skip; with its compiled extension too, which the stand-ins
would hide.
"""

import pytest

from megatron_k2.compat import installed_version


def _reason_to_skip() -> str | None:
    if installed_version("transformer-engine") is None:
        return "Transformer Engine's Python is not in this environment; run make test-te"
    if installed_version("transformer-engine-torch") is not None:
        return "Transformer Engine is here with its compiled part; run make test-te"
    return None


REASON = _reason_to_skip()

if REASON is None:
    from megatron_k2.fp8.compute import choose_scale_format
    from tests.te.standin import install

    choose_scale_format("blockwise")
    install()


@pytest.fixture(scope="session", autouse=True)
def _transformer_engine():
    if REASON is not None:
        pytest.skip(REASON)
