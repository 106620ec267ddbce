"""``blocks.c`` against ``reference``: the same bytes, for every code and every kind of number.

Wrong variants are made of the same source. Not exercised: a machine whose compiler makes other
vectors of it, which would show here.
"""

import shutil

import numpy as np
import pytest
import torch

from megatron_k2.checkpoint.block_fp8 import reference
from megatron_k2.checkpoint.block_fp8.convert import dequantized, requantized
from megatron_k2.checkpoint.block_fp8.layout import BLOCK, scale_shape
from megatron_k2.checkpoint.block_fp8.scales import classify_scales
from megatron_k2.checkpoint.stream.rows import Dtype, Rows, rows_of
from megatron_k2.fp8 import native

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler here")
DTYPES = {Dtype.BF16: torch.bfloat16, Dtype.FP32: torch.float32}
SHAPES = [(1, 1), (128, 128), (130, 260), (5, 300), (256, 64), (300, 513)]


def awkward_codes(shape, seed=0):
    """Every code, subnormal ones and both NaN among them; one block of zeros."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    codes[:128, 256:384] = 0
    return codes.view(reference.E4M3)


def awkward_scales(shape, seed=1):
    """Ordinary, powers of two, and some whose products overflow, are subnormal, or nothing."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(scale_shape(shape), generator=generator) * 1e-3 + 1e-6
    odd = torch.tensor([2.0**-7, 2.0**-120, 2.0**126, 2.0**-140, 0.0, -0.25, torch.inf, torch.nan])
    flat = scales.view(-1)
    flat[1::2] = odd.repeat(len(flat))[: len(flat[1::2])]
    return scales


def awkward_weights(shape, dtype, seed=2):
    """Every magnitude, ties between codes, zeros, infinities and NaN of both signs."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator)
    w.view(-1)[: 8 * BLOCK] *= torch.exp2(torch.arange(8 * BLOCK)[: w.numel()] % 300 - 150.0)
    w[128:, :128] = torch.arange(len(w[128:]) * min(128, shape[1])).view(w[128:, :128].shape) / 8
    w[:128, 128:256] = 0
    w[::50, 256:384] = torch.nan
    w[1::50, 256:384] = -torch.tensor(torch.nan)
    w[2::90, 384:] = -torch.inf
    return w.to(dtype)


@pytest.fixture(params=[False, True], ids=["subnormals", "flushed"])
def _subnormals(request):
    torch.set_flush_denormal(request.param)
    yield
    torch.set_flush_denormal(False)


@needs_compiler
@pytest.mark.usefixtures("_subnormals")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_of_codes_are_torchs_bytes(shape, dtype):
    codes, scales = awkward_codes(shape), awkward_scales(shape)
    found, classes = dequantized(rows_of(codes), rows_of(scales), dtype)
    assert found.equals(rows_of(reference.dequantize(codes, scales, DTYPES[dtype])))
    assert classes == classify_scales(reference.largest_codes(codes).numpy(), scales.numpy())


@needs_compiler
@pytest.mark.usefixtures("_subnormals")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_source", [False, True])
def test_codes_and_scales_of_weights_are_torchs_bytes(shape, dtype, has_source):
    weight = awkward_weights(shape, DTYPES[dtype])
    source = None
    if has_source:  # every other block is the source's
        source = reference.quantize(weight)[1] * 1.5
        back = reference.dequantize(
            reference._encode(weight[:128], source[0]), source[:1], DTYPES[dtype]
        )
        weight[:128, :128] = back[:, :128]
    codes, scales, num_kept = requantized(
        rows_of(weight), source if source is None else rows_of(source)
    )
    expected_codes, expected_scales, expected_kept = reference.requantize(weight, source)
    assert codes.equals(rows_of(expected_codes))
    assert np.array_equal(scales.view(np.uint32), expected_scales.numpy().view(np.uint32))
    assert num_kept == expected_kept
    assert not has_source or num_kept > 0


@needs_compiler
def test_an_unaligned_view_of_a_file_is_read_as_it_lies():
    weight = awkward_weights((130, 200), torch.float32)
    stored = np.frombuffer(b"x" + weight.numpy().tobytes(), np.uint8)[1:]
    rows = Rows(np.ndarray((130, 200), np.float32, stored.data), Dtype.FP32)
    assert not rows.bits.flags.aligned
    assert requantized(rows, None)[0].equals(requantized(rows_of(weight), None)[0])


def test_scales_of_another_shape_are_refused():
    codes, scales = reference.quantize(torch.ones(130, 128))
    with pytest.raises(ValueError, match=r"expected \[2, 1\]"):
        dequantized(rows_of(codes), rows_of(scales[:1]), Dtype.BF16)


@needs_compiler
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("amax / 448.0f :", "amax * (1.0f / 448.0f) :"),
        ("return !memcmp(back", "return 1 || !memcmp(back"),
        ("* scale;", ";"),
    ],
    ids=["448 multiplied", "every block kept", "no scale"],
)
def test_a_wrong_kernel_is_seen(own_cache, monkeypatch, right, wrong):
    folder = shutil.copytree(native.FOLDER, own_cache / "wrong")
    text = (folder / "blocks.c").read_text()
    assert right in text
    (folder / "blocks.c").write_text(text.replace(right, wrong))
    monkeypatch.setattr(native, "FOLDER", folder)
    weight = torch.randn(300, 513, generator=torch.Generator().manual_seed(0))
    source = reference.quantize(weight)[1] * 1.5
    found = requantized(rows_of(weight), rows_of(source))
    expected = reference.requantize(weight, source)
    back = dequantized(found[0], rows_of(source), Dtype.BF16)[0]
    is_same = np.array_equal(found[1], expected[1].numpy()) and found[2] == expected[2]
    assert not (is_same and back.equals(rows_of(reference.dequantize(expected[0], source))))


@pytest.mark.usefixtures("own_cache")
def test_without_a_compiler_torch_does_it(monkeypatch):
    weight = awkward_weights((130, 260), torch.bfloat16)
    monkeypatch.setenv("CC", "no-such-compiler")
    codes, scales, _ = requantized(rows_of(weight), None)
    assert native.library() is None
    assert codes.equals(rows_of(reference.quantize(weight)[0]))
    values, _ = dequantized(codes, Rows(scales, Dtype.FP32), Dtype.BF16)
    assert values.equals(rows_of(reference.dequantize(codes.tensor(), torch.from_numpy(scales))))
