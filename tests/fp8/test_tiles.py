"""1x128 tiles against a loop over numbers: bit-equal codes and scales, and the stated error."""

import itertools

import pytest
import torch

from megatron_k2.fp8.tiles import (
    E4M3_MAX,
    TILE,
    dequantize_tiles,
    num_tiles,
    quantize_tiles,
    stored_bytes,
)
from tests.oracles.fp8 import VALUES, tile_codes


def matrix(rows, width, dtype=torch.float32, seed=0):
    """Magnitudes over many orders, zeros and a whole tile of zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    x *= torch.exp2(torch.randint(-12, 12, (rows, width), generator=generator).float())
    x[torch.rand(rows, width, generator=generator) < 0.05] = 0
    x[0, :TILE] = 0
    return x.to(dtype)


@pytest.mark.parametrize("width", [128, 384, 100, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_scales_equal_the_loop_bit_for_bit(width, dtype):
    x = matrix(9, width, dtype)
    codes, scales = quantize_tiles(x)
    expected_codes, expected_scales = tile_codes(x.float().numpy())
    assert torch.equal(codes.view(torch.uint8), torch.from_numpy(expected_codes))
    assert torch.equal(scales, torch.from_numpy(expected_scales))
    whole_row = x.float().abs().amax(1) / E4M3_MAX
    assert width <= TILE or not torch.equal(scales[:, 0], whole_row), "one scale a row is seen"


def test_ties_go_to_the_even_code():
    """Every number halfway between two codes, next to a 448 that makes the scale 1."""
    halves = [(a + b) / 2 for a, b in itertools.pairwise(VALUES)]
    x = torch.tensor([halves + [448.0] * (128 - len(halves))])
    codes, scales = quantize_tiles(x)
    assert scales.item() == 1
    found = codes.view(torch.uint8)[0, : len(halves)].tolist()
    assert found == [code + code % 2 for code in range(len(halves))]


def test_every_code_comes_back_exactly():
    x = torch.tensor([VALUES + [0.0] * (128 - len(VALUES))]) * torch.tensor([[1.0], [-0.5]])
    codes, scales = quantize_tiles(x)
    assert torch.equal(dequantize_tiles(codes, scales, torch.float32), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [256, 200])
def test_what_comes_back_is_within_half_a_codes_spacing(dtype, width):
    x = matrix(50, width, torch.float32).clamp(-6e4, 6e4).to(dtype)
    back = dequantize_tiles(*quantize_tiles(x), dtype)
    assert back.dtype == dtype
    assert back.shape == x.shape
    amax = torch.zeros(50, num_tiles(width))
    for t in range(num_tiles(width)):
        amax[:, t] = x[:, t * TILE : (t + 1) * TILE].abs().amax(1).float()
    amax = amax.repeat_interleave(TILE, 1)[:, :width]
    error, magnitude = (back.float() - x.float()).abs(), x.float().abs()
    rounding = 2**-4 + {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    is_normal = magnitude >= amax * 2**-14
    assert (error[is_normal] <= rounding * magnitude[is_normal]).all()
    half_spacing = amax / E4M3_MAX * 2**-10
    bound = 1.01 * half_spacing + (rounding - 2**-4) * magnitude
    assert (error[~is_normal] <= bound[~is_normal]).all()


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_a_tile_with_a_number_that_is_not_finite_is_all_nan(bad):
    x = matrix(2, 256)
    x[1, 130] = bad
    back = dequantize_tiles(*quantize_tiles(x), torch.float32)
    assert back[1, 128:].isnan().all()
    assert back[0].isfinite().all()
    assert back[1, :128].isfinite().all()


@pytest.mark.parametrize("magnitude", [2.0**-149, 2.0**-126, 3e38])
def test_the_ends_of_fp32_neither_overflow_nor_divide_by_zero(magnitude):
    x = torch.full((1, 128), magnitude)
    codes, scales = quantize_tiles(x)
    back = dequantize_tiles(codes, scales, torch.float32)
    assert back.isfinite().all()
    assert (back - x).abs().max() <= max(2**-4 * magnitude, 2.0**-126)


def test_bytes_are_counted_as_they_are():
    codes, scales = quantize_tiles(matrix(7, 300))
    assert codes.nbytes + scales.nbytes == stored_bytes(7, 300) == 7 * 300 + 7 * 3 * 4


def test_scales_of_another_matrix_are_refused():
    codes, scales = quantize_tiles(matrix(4, 256))
    with pytest.raises(ValueError, match=r"scales \[4, 2\], expected \[3, 2\]"):
        dequantize_tiles(codes[:3], scales, torch.float32)
