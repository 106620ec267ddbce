import numpy as np
import pytest
import torch

from megatron_k2.checkpoint.stream.rows import WEIGHTS, Dtype, Rows, promoted, rows_of

TORCH = {dtype: getattr(torch, dtype.torch_name) for dtype in Dtype}


def every_kind_of_number():
    """fp32 by bits: random patterns, both sides of each tie of bf16, subnormal, infinite, NaN."""
    generator = np.random.default_rng(0)
    patterns = generator.integers(0, 2**32, 200_000, dtype=np.uint32)
    ties = np.arange(0, 2**16, 7, dtype=np.uint32) << 16
    around = [ties + low for low in (0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    return np.concatenate([patterns, *around]).view(np.float32).reshape(-1, 1)


@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize("source", WEIGHTS)
def test_conversion_is_torchs_bit_for_bit_and_nan_stays_nan(source, dtype):
    wide = torch.from_numpy(every_kind_of_number())
    tensor = wide.to(TORCH[source])
    found = rows_of(tensor).to(dtype)
    expected = tensor.to(TORCH[dtype])
    is_nan = expected.isnan()
    assert torch.equal(found.tensor().isnan(), is_nan)
    same = rows_of(expected[~is_nan])
    assert Rows(found.bits[~is_nan.numpy()], dtype).equals(same)


def test_cutting_off_instead_of_rounding_would_be_seen():
    wide = every_kind_of_number()
    cut = (wide.view(np.uint32) >> 16).astype(np.uint16)
    assert not np.array_equal(cut, Rows(wide, Dtype.FP32).to(Dtype.BF16).bits)


def test_e4m3_needs_its_scales():
    with pytest.raises(ValueError, match="float8_e4m3fn rows cannot become bfloat16"):
        Rows(np.zeros(3, np.uint8), Dtype.E4M3).to(Dtype.BF16)


@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_row_that_is_not_finite_is_found(dtype, bad):
    tensor = torch.full((5, 3), torch.finfo(TORCH[dtype]).max, dtype=TORCH[dtype])
    assert rows_of(tensor).first_not_finite() is None
    tensor[2:, 1] = bad
    assert rows_of(tensor).first_not_finite() == 2


def test_tensors_and_rows_share_memory():
    tensor = torch.ones(2, 3, dtype=torch.bfloat16)
    rows = rows_of(tensor)
    tensor[1, 2] = 5
    assert rows.tensor()[1, 2] == 5


def test_dtypes_are_known_as_torch_and_safetensors_know_them():
    from safetensors.torch import _TYPES

    for dtype in Dtype:
        assert TORCH[dtype].itemsize == dtype.itemsize
        assert _TYPES[dtype.safetensors_name] == TORCH[dtype]


@pytest.mark.parametrize("a", WEIGHTS)
@pytest.mark.parametrize("b", WEIGHTS)
def test_promotion_is_torchs(a, b):
    assert TORCH[promoted((a, b))] == torch.promote_types(TORCH[a], TORCH[b])
