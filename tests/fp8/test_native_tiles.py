"""The C kernels against ``tiles``: the same bytes, for every kind of number and every width.

Wrong variant: a kernel that rounds ties away from zero, made from the same source. Not exercised: a
machine whose compiler makes other vectors of it, which would show here.
"""

import shutil
import subprocess

import pytest
import torch

from megatron_k2.fp8 import native, native_tiles, tiles
from tests.fp8.test_tiles import matrix

pytestmark = pytest.mark.skipif(
    not native_tiles.is_available(torch.float32), reason="no C compiler here"
)


def same_bytes(a, b):
    return all(
        torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True)
    )


def plain_nan(codes):
    """NaN without its sign, which is of whichever factor the processor's code names first."""
    return codes.view(torch.uint8).masked_fill(codes.float().isnan(), 0x7F)


def awkward(width, dtype):
    """Every magnitude, ties between codes, zeros, infinities and NaN."""
    x = matrix(64, width, torch.float32, seed=3)
    x[5] *= 2.0**-130
    x[6] *= 2.0**100
    x[7, 0], x[8, 1], x[9, 2] = float("inf"), -float("inf"), float("nan")
    x[10] = torch.arange(width) / 8.0 - 3  # many ties once scaled by a power of two
    x[10, 0] = 448.0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [128, 384, 100, 300, 1])
def test_codes_scales_and_what_comes_back_are_torchs_bytes(width, dtype):
    x = awkward(width, dtype) if width > 2 else matrix(64, 2, dtype)[:, :1]
    found, expected = native_tiles.quantize_tiles(x), tiles.quantize_tiles(x.contiguous())
    assert torch.equal(plain_nan(found[0]), plain_nan(expected[0]))
    assert torch.equal(found[1].nan_to_num(-1), expected[1].nan_to_num(-1))
    back = native_tiles.dequantize_tiles(*expected, dtype)
    assert torch.equal(
        back.float().nan_to_num(7), tiles.dequantize_tiles(*expected, dtype).float().nan_to_num(7)
    )


def test_every_code_comes_back_as_torchs():
    codes = torch.arange(256, dtype=torch.uint8).view(tiles.E4M3).view(2, 128)
    scales = torch.tensor([[0.75], [3.0]])
    for dtype in (torch.float32, torch.bfloat16):
        found = native_tiles.dequantize_tiles(codes, scales, dtype)
        expected = tiles.dequantize_tiles(codes, scales, dtype)
        assert torch.equal(found.isnan(), expected.isnan())
        assert same_bytes([found.nan_to_num(0)], [expected.nan_to_num(0)])


def test_rows_with_a_stride_and_other_dtypes_are_taken_as_they_are():
    x = matrix(16, 512, torch.bfloat16)[:, 128:256]
    assert same_bytes(native_tiles.quantize_tiles(x), tiles.quantize_tiles(x.contiguous()))
    half = matrix(4, 256).clamp(-6e4, 6e4).half()
    assert same_bytes(native_tiles.quantize_tiles(half), tiles.quantize_tiles(half))
    codes, scales = tiles.quantize_tiles(x)
    with pytest.raises(ValueError, match="scales"):
        native_tiles.dequantize_tiles(codes[:3], scales, torch.float32)


def test_ties_away_from_zero_are_seen(own_cache, monkeypatch):
    wrong = shutil.copytree(native.FOLDER, own_cache / "wrong")
    right = (wrong / "e4m3.h").read_text()
    (wrong / "e4m3.h").write_text(
        right.replace("magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)", "magnitude + 0x80000u")
    )
    assert (wrong / "e4m3.h").read_text() != right
    monkeypatch.setattr(native, "FOLDER", wrong)
    x = awkward(128, torch.float32)
    assert not same_bytes(native_tiles.quantize_tiles(x)[:1], tiles.quantize_tiles(x)[:1])


@pytest.mark.usefixtures("own_cache")
def test_without_a_compiler_torch_does_it(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    x = matrix(4, 256)
    assert not native_tiles.is_available(x.dtype)
    assert same_bytes(native_tiles.quantize_tiles(x), tiles.quantize_tiles(x))
    monkeypatch.setattr(subprocess, "run", None)  # and does not try again
    native_tiles.quantize_tiles(x)
