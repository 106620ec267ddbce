"""Symmetric products against the plain GEMM; the Triton kernel under its interpreter.

Not exercised where there is no GPU: that the Triton kernel is right on one, in bf16 above all,
since the interpreter multiplies bf16 bit patterns (Triton issue 11584). That it compiles for sm_90
is checked everywhere.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from megatron_k2.optimizer.newton_schulz.cost import num_computed_elements
from megatron_k2.optimizer.newton_schulz.iteration import orthogonalize, symmetric_method
from megatron_k2.optimizer.newton_schulz.symmetric import product
from tests.support.paths import REPOSITORY

INTERPRETED = """
import torch
from megatron_k2.optimizer.newton_schulz.iteration import orthogonalize
from megatron_k2.optimizer.newton_schulz.symmetric import product

g = torch.Generator().manual_seed(0)
for shape in ((100, 70), (2, 65, 90), (2, 330, 64)):
    X = torch.randn(*shape, generator=g)
    A = product(X, X.mT, symmetric="triton")
    torch.testing.assert_close(A, X @ X.mT, rtol=1e-5, atol=1e-4)
    assert torch.equal(A[..., :64, 64:], A[..., 64:, :64].mT), "the mirror is a copy"
    B = product(A, A, add=A, beta=-4.775, alpha=2.0315, symmetric="triton")
    torch.testing.assert_close(B, 2.0315 * A @ A - 4.775 * A, rtol=1e-5, atol=1e-2)
    wrong = 2.0315 * A @ A + A
    assert (B - wrong).abs().max() > 1, "a dropped beta would be seen"
for i in range(2):
    alone = product(X[i], X[i].mT, symmetric="triton")
    assert torch.equal(alone, A[i]), "a result does not depend on its batch"
for form in ("plain", "gram"):
    torch.testing.assert_close(
        orthogonalize(X, form=form, symmetric="triton"),
        orthogonalize(X, form=form), rtol=0, atol=1e-5)
try:
    product(X.double(), X.double().mT, symmetric="triton")
except ValueError as error:
    assert "blocks" in str(error)
print("interpreted")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_k2.optimizer.newton_schulz.triton_symmetric import (
    INNER_TILE,
    _upper_triangle_kernel,
)
import torch
from megatron_k2.optimizer.newton_schulz.cost import triton_tile

bf16 = torch.bfloat16
constants = {"HAS_ADDEND": True, "IS_EVEN": False, "TILE": triton_tile(bf16),
             "INNER": INNER_TILE[bf16]}
names = _upper_triangle_kernel.arg_names
signature = {
    n: "constexpr" if n in constants else "*bf16" if n.endswith("_ptr")
    else "fp32" if n in ("alpha", "beta") else "i32"
    for n in names
}
values = {(names.index(n),): value for n, value in constants.items()}
source = ASTSource(_upper_triangle_kernel, signature, values)
print(sorted(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm))
"""

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("rows", [257, 300, 301])
def test_blocked_product_is_the_gemm_and_mirrors_exactly(rows):
    X = torch.randn(2, rows, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A = product(X, X.mT, symmetric="blocks")
    torch.testing.assert_close(A, X @ X.mT, rtol=1e-12, atol=1e-12)
    block = -(-rows // 4)
    assert torch.equal(A[..., :block, block:], A[..., block:, :block].mT)
    B = product(A, A, add=A, beta=-4.775, alpha=2.0315, symmetric="blocks")
    torch.testing.assert_close(B, 2.0315 * A @ A - 4.775 * A, rtol=1e-12, atol=1e-10)


def test_blocked_newton_schulz_equals_the_ordinary_one():
    G = torch.randn(260, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for form in ("plain", "gram"):
        torch.testing.assert_close(
            orthogonalize(G, form=form, symmetric="blocks"),
            orthogonalize(G, form=form),
            rtol=0,
            atol=1e-9,
        )


def test_blocks_save_three_eighths_where_they_pay():
    fp32, bf16 = torch.float32, torch.bfloat16
    assert num_computed_elements(256, 256, "none", fp32) == 256 * 256
    assert num_computed_elements(256, 256, "blocks", fp32) == 256 * 256 * 5 // 8
    assert num_computed_elements(256, 256, "blocks", bf16) == 256 * 256
    assert num_computed_elements(512, 1792, "blocks", bf16) == 512 * 512 * 5 // 8
    assert num_computed_elements(100, 100, "blocks", fp32) == 100 * 100
    assert num_computed_elements(256, 256, "triton", fp32) == 64 * 64 * 10
    assert num_computed_elements(512, 256, "triton", bf16) == 128 * 128 * 10


@pytest.mark.slow
@needs_triton
def test_triton_kernel_equals_the_gemm_under_the_interpreter():
    assert "interpreted" in run_python(INTERPRETED, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(384, 1000), (3, 200, 520), (2, 520, 200)])
def test_on_a_gpu_the_kernel_gives_what_ordinary_products_give(shape, dtype, bound):
    """To the rounding of five steps: a relative bound on all of a matrix, in norm."""
    if not torch.cuda.is_available():
        pytest.skip("a CUDA device is needed")
    G = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).cuda()
    method = symmetric_method(*shape[-2:], dtype, G.device, "triton")
    assert method == "triton"
    for form in ("plain", "gram"):
        found = orthogonalize(G, dtype=dtype, form=form, symmetric=method).double()
        expected = orthogonalize(G, dtype=dtype, form=form).double()
        assert (found - expected).norm() < bound * expected.norm()


@pytest.mark.slow
@needs_triton
def test_triton_kernel_compiles_for_hopper(tmp_path):
    assert "cubin" in run_python(COMPILED, TRITON_CACHE_DIR=str(tmp_path))
