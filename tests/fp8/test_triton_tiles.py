"""The Triton kernels under the CPU interpreter: the same bytes as ``tiles``; compiled for sm_90.

The interpreter's own fp8 and bf16 rounding is wrong (``tests/support/triton_interpreter.py``). Not
exercised: a GPU, where ``maximum`` and ``div_rn`` are other code.
"""

import importlib.util

import pytest
import torch

from tests.fp8.test_tiles import matrix
from tests.optimizer.newton_schulz.test_symmetric import run_python

INTERPRETED = """
import sys
import torch
from megatron_k2.fp8 import tiles, triton_tiles
if "stock" not in sys.argv:
    from tests.support.triton_interpreter import round_as_torch_does
    round_as_torch_does()

def matrix(m, k, dtype):
    g = torch.Generator().manual_seed(m + k)
    x = torch.randn(m, k, generator=g)
    x *= torch.exp2(torch.randint(-12, 12, (m, k), generator=g).float())
    x[0, :128] = 0
    return x.to(dtype)

wrong = 0
for m, k in ((40, 256), (33, 200), (1, 128), (3, 100)):
    for dtype in (torch.float32, torch.bfloat16):
        x = matrix(m, k, dtype)
        x[m - 1, k - 1] = float("nan") if m == 33 else 1.0
        codes, scales = triton_tiles.quantize_tiles(x)
        expected_codes, expected_scales = tiles.quantize_tiles(x)
        assert torch.equal(scales.nan_to_num(-1), expected_scales.nan_to_num(-1)), (m, k, dtype)
        is_nan = expected_codes.float().isnan()
        assert "stock" in sys.argv or torch.equal(codes.float().isnan(), is_nan)
        differ = codes.view(torch.uint8) != expected_codes.view(torch.uint8)
        wrong += differ[~is_nan].sum().item()
        back = triton_tiles.dequantize_tiles(expected_codes, expected_scales, dtype)
        expected = tiles.dequantize_tiles(expected_codes, expected_scales, dtype)
        assert "stock" in sys.argv or torch.equal(back.nan_to_num(7), expected.nan_to_num(7))
strided = matrix(40, 512, torch.float32)[:, 128:384]
codes, scales = triton_tiles.quantize_tiles(strided)
expected_codes, _ = tiles.quantize_tiles(strided)
wrong += (codes.view(torch.uint8) != expected_codes.view(torch.uint8)).sum().item()
codes, scales = triton_tiles.quantize_tiles(strided[:0])
assert codes.shape == (0, 256) and scales.shape == (0, 2)
assert triton_tiles.dequantize_tiles(codes, scales, torch.bfloat16).shape == (0, 256)
print("wrong bytes", wrong)
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_k2.fp8 import triton_tiles
from megatron_k2.fp8.tiles import AMAX_FLOOR, E4M3_MAX

constants = {"ROWS": 32, "TILE": 128, "MAX": E4M3_MAX, "FLOOR": AMAX_FLOOR}
types = {"x_ptr": "*bf16", "code_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "out_ptr": "*bf16"}
for kernel in (triton_tiles._quantize, triton_tiles._dequantize):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    values = {(names.index(n),): constants[n] for n in names if n in constants}
    source = ASTSource(kernel, signature, values)
    print(sorted(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm))
"""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def _interpreted(*arguments):
    code = f"import sys; sys.argv += {list(arguments)}\n{INTERPRETED}"
    return run_python(code, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.slow
def test_interpreted_kernels_give_the_bytes_of_the_torch_implementation():
    assert "wrong bytes 0\n" in _interpreted()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_on_a_gpu_give_the_bytes_of_the_cpu(dtype):
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("a GPU with E4M3 (compute capability 8.9) is needed")
    from megatron_k2.fp8 import tiles
    from megatron_k2.fp8.pack import restore, store

    x = matrix(300, 1000, dtype)
    stored = store(x.cuda())
    codes, scales = tiles.quantize_tiles(x)
    assert torch.equal(stored.codes.cpu().view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(stored.scales.cpu(), scales)
    assert torch.equal(restore(stored).cpu(), tiles.dequantize_tiles(codes, scales, dtype))


@pytest.mark.slow
def test_the_stock_interpreter_still_rounds_wrongly():
    """If this fails, Triton has been repaired: drop ``tests/support/triton_interpreter.py``."""
    assert int(_interpreted("stock").split()[-1]) > 100


@pytest.mark.slow
def test_kernels_compile_for_hopper(tmp_path):
    assert run_python(COMPILED, TRITON_CACHE_DIR=str(tmp_path)).count("cubin") == 2
