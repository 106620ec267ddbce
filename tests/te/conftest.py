"""Transformer Engine's Python on stand-ins, in an environment of its own: ``make test-te``.

Once TE is importable Megatron switches to it everywhere, so it must stay out of the environment of
the other tests. Without it these tests skip. With its compiled extension, which the stand-ins would
hide, only the bodies marked ``gpu`` run: the same, on GPUs, over TE itself and NCCL.
"""

import os

import pytest

from megatron_k2.host.repairs import installed_version

HAS_PYTHON = installed_version("transformer-engine") is not None
HAS_ALL = installed_version("transformer-engine-torch") is not None

if HAS_ALL:
    # TE multiplies fp32 in TF32 (common/gemm/cublaslt_gemm.cu), which is three digits. cuBLAS reads
    # this when it is loaded, here and in the ranks started from here.
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")

if HAS_PYTHON:
    from megatron_k2.fp8.compute import choose_scale_format
    from tests.te.standin import prepare

    choose_scale_format("blockwise")
    prepare()


def pytest_collection_modifyitems(items):
    """A test runs over the stand-ins, or if it is marked ``gpu`` over Transformer Engine."""
    for item in items:
        if "tests/te/" not in item.path.as_posix():
            continue
        needs_all = item.get_closest_marker("gpu") is not None
        if not HAS_PYTHON:
            reason = "Transformer Engine's Python is not in this environment; run make test-te"
        elif HAS_ALL and not needs_all:
            reason = "Transformer Engine is here with its compiled part; run make test-te"
        elif needs_all and not HAS_ALL:
            reason = "needs GPUs and Transformer Engine with its compiled part"
        else:
            continue
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def _transformer_engine():
    """Asked for by what imports it: behind the skips above."""


@pytest.fixture(params=["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def host(request):
    """The same body over the stand-ins and, where Transformer Engine is whole, on a GPU."""
    return request.param
