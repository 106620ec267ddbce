import math
import struct

import pytest
import torch

from megatron_k2.checkpoint.block_fp8 import reference
from megatron_k2.checkpoint.block_fp8.layout import BLOCK, scale_shape
from megatron_k2.checkpoint.block_fp8.reference import E4M3
from megatron_k2.checkpoint.block_fp8.scales import ScaleClass, classify_scales

SHAPES = [(1, 1), (128, 128), (130, 260), (5, 300), (256, 64)]


def e4m3(code):
    """The format's definition: 1 sign, 4 exponent (bias 7), 3 mantissa bits; S.1111.111 is NaN."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


def fp32(x):
    return struct.unpack("f", struct.pack("f", x))[0]


def oracle_quantize(rows):
    """Per block, in Python floats: scale and the nearest code by search, ties to even codes."""
    finite = [c for c in range(256) if not math.isnan(e4m3(c)) and c != 0x80]
    m, n = len(rows), len(rows[0])
    codes, scales = [[0] * n for _ in rows], {}
    for top in range(0, m, BLOCK):
        for left in range(0, n, BLOCK):
            cells = [
                (r, c)
                for r in range(top, min(top + BLOCK, m))
                for c in range(left, min(left + BLOCK, n))
            ]
            amax = max(abs(rows[r][c]) for r, c in cells)
            scale = fp32(amax / 448) if amax else 1.0
            scales[top // BLOCK, left // BLOCK] = scale
            for r, c in cells:
                q = fp32(rows[r][c] / scale)
                codes[r][c] = min(finite, key=lambda k: (abs(e4m3(k) - q), k & 1))
    return codes, scales


def weight(shape, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.02).to(dtype)


def blockwise(value, shape):
    """[mb, nb] -> [m, n]."""
    m, n = shape
    return value.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:m, :n]


def same_values(codes, expected):
    """-0 and 0 are one value."""
    return torch.equal(codes.float(), expected.view(E4M3).float())


@pytest.mark.parametrize("shape", [(3, 5), (129, 2), (2, 130)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantising_is_the_python_loops_code_for_code(shape, dtype):
    w = weight(shape, dtype)
    codes, scales = reference.quantize(w)
    expected_codes, expected_scales = oracle_quantize(w.float().tolist())
    assert {(i, j): scales[i, j].item() for i, j in expected_scales} == expected_scales
    assert same_values(codes, torch.tensor(expected_codes, dtype=torch.uint8))


def test_dividing_by_the_scale_is_not_multiplying_by_448_over_amax():
    """The wrong variant: one rounding more, and codes at a tie move."""
    w = weight((256, 256), torch.float32)
    codes, scales = reference.quantize(w)
    inverse = blockwise(1 / scales, w.shape)
    wrong = (w * inverse).clamp(-448, 448)
    right = w / blockwise(scales, w.shape)
    assert not torch.equal(wrong, right)
    assert torch.equal(codes.view(torch.uint8), right.to(E4M3).view(torch.uint8))


def test_all_256_codes_dequantise_to_their_definition_and_come_back():
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    scale = torch.full((1, 1), 2.0**-7)
    values = reference.dequantize(codes.view(E4M3), scale, torch.float32)
    expected = torch.tensor([e4m3(c) * 2.0**-7 for c in range(256)]).view(2, 128)
    assert torch.equal(values.nan_to_num(9.0), expected.nan_to_num(9.0))
    finite = torch.tensor([not math.isnan(e4m3(c)) for c in range(256)]).view(2, 128)
    back, _ = reference._encode_as(values, scale[0])
    assert torch.equal(back.view(torch.uint8)[finite], codes[finite])
    assert back.float().isnan()[~finite].all()


def test_subnormal_codes_survive_where_the_processor_flushes_subnormal_numbers():
    """The CPU host makes it flush; 14 of the 254 finite codes are below e4m3's normal range."""
    codes = torch.arange(1, 8, dtype=torch.uint8).repeat(128, 1).view(E4M3)
    torch.set_flush_denormal(True)
    try:
        found = reference.dequantize(codes, torch.ones(1, 1), torch.float32)
    finally:
        torch.set_flush_denormal(False)
    assert found[0].tolist() == [mantissa * 2.0**-9 for mantissa in range(1, 8)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dequantising_is_one_product_and_one_rounding(shape, dtype):
    codes, scales = reference.quantize(weight(shape))
    expected = (codes.float() * blockwise(scales, shape)).to(dtype)
    assert torch.equal(reference.dequantize(codes, scales, dtype), expected)


def test_rounding_to_bf16_before_the_product_is_seen():
    codes, scales = reference.quantize(weight((128, 128)))
    wrong = codes.to(torch.bfloat16) * scales.to(torch.bfloat16)
    assert not torch.equal(reference.dequantize(codes, scales), wrong)


@pytest.mark.parametrize("m", [256, 576])
def test_a_row_chunk_from_a_block_boundary_is_that_part_of_the_whole(m):
    codes, scales = reference.quantize(weight((m, 300)))
    whole = reference.dequantize(codes, scales)
    assert torch.equal(reference.dequantize(codes[128:], scales[1:]), whole[128:])


def test_kv_down_projections_half_block_has_a_scale_of_its_own():
    assert scale_shape((576, 7168)) == (5, 56)
    _, scales = reference.quantize(torch.cat((torch.ones(512, 3), torch.full((64, 3), 4.48))))
    assert scales.flatten().tolist() == pytest.approx([1 / 448] * 4 + [0.01])


def test_scales_of_another_shape_are_refused():
    codes, scales = reference.quantize(weight((130, 128)))
    with pytest.raises(ValueError, match=r"expected \[2, 1\]"):
        reference.dequantize(codes, scales[:1])


def test_a_block_of_zeros_stays_zeros():
    w = weight((256, 128))
    w[:128] = 0
    codes, scales = reference.quantize(w)
    assert scales[0].item() == 1
    assert torch.equal(reference.dequantize(codes, scales)[:128], w[:128])


def test_nan_stays_nan_and_its_neighbours_block_is_untouched():
    w = weight((128, 256))
    clean, _ = reference.quantize(w)
    w[3, 4] = math.nan
    codes, _ = reference.quantize(w)
    assert codes[3, 4].float().isnan()
    assert torch.equal(codes[:, 128:].view(torch.uint8), clean[:, 128:].view(torch.uint8))


def source_of_class(kind, shape=(256, 200)):
    """A release whose scales were made in one of three ways."""
    if kind is ScaleClass.BF16_AMAX:
        return reference.quantize(weight(shape, torch.bfloat16))
    if kind is ScaleClass.FP32_AMAX:
        return reference.quantize(weight(shape, torch.float32))
    w = weight(shape, torch.float32)
    _, scales = reference.quantize(w)
    powers = torch.exp2(torch.ceil(torch.log2(scales)))
    return (w / blockwise(powers, shape)).to(E4M3), powers


CLASSES = (ScaleClass.BF16_AMAX, ScaleClass.FP32_AMAX, ScaleClass.OTHER)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_three_classes_of_scales_are_told_apart(kind):
    codes, scales = source_of_class(kind)
    found = classify_scales(reference.largest_codes(codes).numpy(), scales.numpy())
    assert found == {kind: scales.numel()}


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_untouched_weights_come_back_byte_for_byte_with_the_sources_scales(kind, dtype):
    codes, scales = source_of_class(kind)
    again, kept_scales, num_kept = reference.requantize(
        reference.dequantize(codes, scales, dtype), scales
    )
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(kept_scales, scales)
    assert num_kept == scales.numel()


def test_without_the_sources_scales_each_class_keeps_what_it_can():
    same_codes, same_scales = {}, {}
    for kind in CLASSES:
        codes, scales = source_of_class(kind)
        again, fresh = reference.quantize(reference.dequantize(codes, scales))
        same_codes[kind] = torch.equal(again.view(torch.uint8), codes.view(torch.uint8))
        same_scales[kind] = torch.equal(fresh, scales)
    assert same_codes == dict(zip(CLASSES, (True, True, False), strict=True))
    assert same_scales == dict(zip(CLASSES, (True, False, False), strict=True))


def test_a_touched_block_is_quantised_anew_and_its_neighbours_are_not():
    codes, scales = source_of_class(ScaleClass.OTHER, (256, 256))
    w = reference.dequantize(codes, scales)
    w[200, 10] += 1
    again, new_scales, num_kept = reference.requantize(w, scales)
    assert num_kept == 3
    touched = torch.zeros(2, 2, dtype=torch.bool)
    touched[1, 0] = True
    assert torch.equal(new_scales != scales, touched)
    untouched = ~blockwise(touched, w.shape)
    assert torch.equal(again.view(torch.uint8)[untouched], codes.view(torch.uint8)[untouched])
    assert new_scales[1, 0] == w[128:, :128].abs().max().float() / 448


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dequantising_is_transformers_bit_for_bit(dtype):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes, scales = source_of_class(ScaleClass.FP32_AMAX, (256, 384))
    theirs = Fp8Dequantize(None)._dequantize_one(codes, scales, dtype)
    assert torch.equal(reference.dequantize(codes, scales, dtype), theirs)
