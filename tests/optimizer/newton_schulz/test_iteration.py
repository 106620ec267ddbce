"""Newton-Schulz against the SVD, against torch.optim.Muon, and against itself in other forms.

Not exercised: any GPU path, fp16, matrices above 300 rows.
"""

from functools import cache

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_k2.optimizer.newton_schulz import iteration
from megatron_k2.optimizer.newton_schulz.coefficients import COEFFICIENTS
from megatron_k2.optimizer.newton_schulz.cost import choose_form, newton_schulz_flops
from megatron_k2.optimizer.newton_schulz.iteration import (
    batch_size,
    orthogonalize,
    symmetric_method,
)
from tests.oracles.polar import (
    SPECTRA,
    matrix_with_spectrum,
    polar_factor,
    polynomial_of_singular_values,
)

# Relative error to UVᵀ and the interval of singular values, 256x1024, fp32, measured once and
# rounded up. They follow from the polynomials: a set maps [s_min, 1] of the normalised spectrum to
# the interval.
SVD_BOUNDS = [
    ("jordan", 5, "gaussian", 0.154, (0.68, 1.13)),
    ("jordan", 5, "power_1", 0.183, (0.68, 1.20)),
    ("quintic", 5, "gaussian", 0.017, (0.96, 1.05)),
    ("quintic", 5, "power_1", 0.085, (0.97, 1.15)),
    ("polar_express", 5, "gaussian", 0.085, (0.86, 1.12)),
    ("polar_express", 5, "condition_1e3", 0.267, (0.21, 1.12)),
    ("polar_express", 8, "gaussian", 0.001, (0.99, 1.01)),
    ("deepseek_v4", 10, "condition_1e3", 0.001, (0.99, 1.01)),
]


@cache
def cached_polar_factor(spectrum):
    return polar_factor(matrix_with_spectrum(256, 1024, spectrum))


@pytest.mark.parametrize(("name", "steps", "spectrum", "error", "interval"), SVD_BOUNDS)
@pytest.mark.parametrize("form", ["plain", "gram"])
def test_result_is_the_polar_factor_within_the_sets_bounds(
    name, steps, spectrum, error, interval, form
):
    G = matrix_with_spectrum(256, 1024, spectrum).float()
    UVt = cached_polar_factor(spectrum)
    result = orthogonalize(G, coefficients=name, steps=steps, form=form)
    assert ((result - UVt).norm() / UVt.norm()).item() <= error + 0.02
    values = torch.linalg.svdvals(result)
    assert interval[0] - 0.02 <= values.min().item()
    assert values.max().item() <= interval[1] + 0.02


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("form", ["plain", "gram"])
def test_fp64_equals_the_polynomials_applied_to_the_singular_values(name, spectrum, form):
    """The derivative of five composed steps is at most 8.3⁵ < 1e5 (Polar Express, most of it at 0),

    of ten at most 3.45¹⁰ < 3e5: times a few hundred roundings of 1e-16 that stays below 1e-8.
    """
    row = COEFFICIENTS[name]
    G = matrix_with_spectrum(48, 160, spectrum)
    expected = polynomial_of_singular_values(G, row.take(row.default_steps))
    torch.testing.assert_close(
        orthogonalize(G, coefficients=name, form=form), expected, rtol=0, atol=1e-8
    )


def test_the_oracle_sees_a_wrong_coefficient():
    G = matrix_with_spectrum(48, 160, "gaussian")
    row = COEFFICIENTS["quintic"]
    expected = polynomial_of_singular_values(G, row.take(5)[::-1])
    assert (orthogonalize(G, coefficients="quintic") - expected).abs().max() > 1e-3


def _in_torchs_order(X, dtype):
    """torch.optim.Muon's and Moonlight's normalisation, in place of ``iteration._normalize``."""
    X = X.to(dtype)
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    return X / norm.clamp(min=1e-7), norm[..., 0, 0]


@pytest.mark.parametrize("shape", [(96, 384), (384, 96), (64, 64), (61, 150)])
def test_bit_equal_to_torch_optim_muon_but_for_the_norm(monkeypatch, shape):
    """Without momentum its update is NS(gradient); both end in the same two operations."""
    monkeypatch.setattr(iteration, "_normalize", _in_torchs_order)
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape))
    ours = weight.detach().clone()
    theirs = torch.optim.Muon(
        [weight],
        lr=0.02,
        weight_decay=0.1,
        momentum=0.0,
        nesterov=False,
        adjust_lr_fn="match_rms_adamw",
    )
    for _ in range(3):
        weight.grad = torch.randn(shape)
        update = orthogonalize(
            weight.grad,
            coefficients="jordan",
            steps=5,
            form="plain",
            dtype=torch.bfloat16,
        )
        ours.mul_(1 - 0.02 * 0.1).add_(update, alpha=-0.02 * (0.2 * max(shape) ** 0.5))
        theirs.step()
        assert torch.equal(ours, weight.detach())


def test_our_order_of_normalisation_is_not_bit_equal_to_torch_optim_muon(monkeypatch):
    G = torch.randn(96, 384, generator=torch.Generator().manual_seed(0))
    kwargs = {"form": "plain", "dtype": torch.bfloat16}
    ours = orthogonalize(G, **kwargs)
    monkeypatch.setattr(iteration, "_normalize", _in_torchs_order)
    assert not torch.equal(ours, orthogonalize(G, **kwargs))


def test_bf16_stays_within_three_percent_of_fp32():
    """Fifteen products of relative rounding 2⁻⁹ each, amplified at most by the steps' slopes near
    1.

    Those slopes are below 2 for jordan, and errors of different products add like a random walk:
    sqrt(15) · 2 · 2⁻⁹ = 0.015.
    """
    G = matrix_with_spectrum(96, 384, "gaussian").float()
    exact = orthogonalize(G)
    for form in ("plain", "gram"):
        low = orthogonalize(G, form=form, dtype=torch.bfloat16).float()
        assert ((low - exact).norm() / exact.norm()).item() < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["plain", "gram"])
def test_batched_is_bit_equal_to_looped(dtype, form):
    G = torch.randn(2, 3, 40, 100, generator=torch.Generator().manual_seed(0))
    batched = orthogonalize(G, form=form, dtype=dtype)
    assert batched.shape == G.shape
    for i in range(2):
        for j in range(3):
            assert torch.equal(batched[i, j], orthogonalize(G[i, j], form=form, dtype=dtype))


@pytest.mark.parametrize("form", ["plain", "gram"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tall_is_wide_transposed(dtype, form):
    G = torch.randn(3, 40, 100, generator=torch.Generator().manual_seed(0))
    for X in (G, G[0]):
        tall, wide = (orthogonalize(Y, dtype=dtype, form=form) for Y in (X.mT.contiguous(), X))
        assert torch.equal(tall, wide.mT)
        assert tall.is_contiguous()


def test_rows_and_columns_permute_through():
    g = torch.Generator().manual_seed(0)
    G = torch.randn(96, 384, generator=g)
    rows, cols = torch.randperm(96, generator=g), torch.randperm(384, generator=g)
    expected = orthogonalize(G)[rows][:, cols]
    torch.testing.assert_close(
        orthogonalize(G[rows][:, cols].contiguous()), expected, rtol=0, atol=2e-6
    )


def test_power_of_two_scale_is_bit_exact_and_others_to_rounding():
    G = torch.randn(96, 384, generator=torch.Generator().manual_seed(0))
    reference = orthogonalize(G)
    for exponent in (-90, -20, 40):
        assert torch.equal(orthogonalize(G * 2.0**exponent), reference)
    torch.testing.assert_close(orthogonalize(G * 1e-3), reference, rtol=0, atol=2e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e-10, 1e-20, 1e-30, 1e-36])
def test_update_norm_does_not_depend_on_the_gradients_norm(scale):
    G = torch.randn(96, 384, generator=torch.Generator().manual_seed(0))
    G = G / G.norm()
    reference = orthogonalize(G).norm()
    assert (orthogonalize(G * scale).norm() / reference).item() == pytest.approx(1.0, abs=1e-4)


def test_torch_order_shrinks_the_update_of_a_small_gradient(monkeypatch):
    """What our normalisation is for: Megatron-Core with the same eps stalls alike."""
    G = torch.randn(96, 384, generator=torch.Generator().manual_seed(0))
    G = G / G.norm()
    expected = orthogonalize(G).norm()
    monkeypatch.setattr(iteration, "_normalize", _in_torchs_order)
    small = orthogonalize(G * 1e-10, dtype=torch.bfloat16)
    assert small.float().norm() < 0.1 * expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_stays_zero_and_its_neighbours_are_untouched(dtype):
    G = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))
    G[1] = 0
    result = orthogonalize(G, dtype=dtype)
    assert torch.equal(result[1], torch.zeros(20, 50, dtype=dtype))
    assert result[0].norm() > 1
    assert result[2].norm() > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["plain", "gram"])
def test_rank_deficient_stays_finite_with_singular_values_bounded(dtype, form):
    G = matrix_with_spectrum(64, 160, "half_rank").float()
    values = torch.linalg.svdvals(orthogonalize(G, dtype=dtype, form=form).float())
    assert values.isfinite().all()
    assert values.max() < 1.3
    assert values[:32].min() > 0.6
    # rounding noise of the null space grows by at most 3.4445 a step: 2⁻⁹ · 485 in the worst case
    assert values[32:].max() < (1e-3 if dtype == torch.float32 else 1.0)


def test_a_nan_spoils_its_own_matrix_only():
    G = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))
    G[1, 3, 4] = torch.nan
    result = orthogonalize(G)
    assert result[[0, 2]].isfinite().all()
    assert result[1].isnan().all()


def test_input_is_not_modified_in_its_own_dtype():
    G = torch.randn(20, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = G.clone()
    orthogonalize(G)
    assert torch.equal(G, before)


class _NoHostSync(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} copies a value to the host")
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_on_the_host():
    G = torch.randn(20, 50)
    with _NoHostSync():
        for form in ("plain", "gram"):
            orthogonalize(G, form=form)
    with pytest.raises(AssertionError, match="host"), _NoHostSync():
        G.norm().item()


def test_flops_are_the_closed_form_and_auto_takes_the_cheaper():
    n, m = 128, 512
    assert newton_schulz_flops(n, m, (5,), "plain") == (20 * 4 + 10) * n**3
    assert newton_schulz_flops(m, n, (2, 2, 1), "gram") == (12 * 4 + 22) * n**3
    assert newton_schulz_flops(m, n, (3, 2), "gram") == (8 * 4 + 28) * n**3
    assert newton_schulz_flops(m, n, (5,), "gram") == (4 * 4 + 34) * n**3
    assert choose_form(128, 128, (3, 2), "auto") == "plain"
    assert choose_form(100, 150, (3, 2), "auto") == "plain"  # r = 1.5: a tie, 40 n³ either way
    assert choose_form(100, 160, (3, 2), "auto") == "gram"
    assert newton_schulz_flops(2048, 7168, (3, 2)) == newton_schulz_flops(
        2048, 7168, (3, 2), "gram"
    )


def test_blocks_are_for_large_matrices_that_are_a_batch_of_their_own():
    """Else a result would depend on which matrices it was batched with."""
    cpu, bf16, fp32 = torch.device("cpu"), torch.bfloat16, torch.float32
    sizes = (64, 256, 512, 896, 1024, 2048)
    for dtype in (bf16, fp32):
        shapes = [(rows, cols) for rows in sizes for cols in sizes]
        blocked = [s for s in shapes if symmetric_method(*s, dtype, cpu) == "blocks"]
        assert blocked
        assert all(batch_size(*shape, dtype, cpu) == 1 for shape in blocked)
    assert symmetric_method(1024, 3584, bf16, cpu) == "blocks"
    assert symmetric_method(896, 1024, bf16, cpu) == "none"
    assert symmetric_method(1024, 896, fp32, cpu) == "blocks"
    assert symmetric_method(256, 896, fp32, cpu) == "none"


@pytest.mark.parametrize("is_measured", [False, True])
def test_a_gpu_computes_one_triangle_where_that_was_measured_to_pay_or_is_asked_for(
    is_measured, monkeypatch
):
    monkeypatch.setattr(iteration, "has_measured_kernel", lambda: is_measured)
    gpu, bf16 = torch.device("cuda"), torch.bfloat16
    assert symmetric_method(1536, 7168, bf16, gpu) == "none"
    assert symmetric_method(4096, 2048, bf16, gpu) == ("triton" if is_measured else "none")
    assert symmetric_method(2048, 7168, torch.float32, gpu) == "none"
    assert symmetric_method(2048, 7168, bf16, gpu, "none") == "none"
    assert symmetric_method(1024, 3584, bf16, gpu, "triton") == "triton"
    assert symmetric_method(64, 64, torch.float32, gpu, "triton") == "triton"
    cpu = torch.device("cpu")
    assert symmetric_method(1024, 3584, bf16, cpu, "triton") == "blocks"
    assert symmetric_method(64, 64, bf16, cpu, "triton") == "none"


def test_flops_count_what_the_products_execute():
    """Every matrix product of a run, counted by torch's own FLOP counter."""
    from torch.utils.flop_counter import FlopCounterMode

    for symmetric in ("none", "blocks"):
        for form in ("plain", "gram"):
            for segments in ((3,), (3, 2), (5, 2, 1)):
                with FlopCounterMode(display=False) as counter:
                    orthogonalize(
                        torch.randn(260, 600),
                        steps=sum(segments),
                        form=form,
                        symmetric=symmetric,
                        segments=segments,
                    )
                counted = newton_schulz_flops(260, 600, segments, form, symmetric, torch.float32)
                assert counter.get_total_flops() == counted


def test_the_norm_it_forms_survives_where_squares_underflow():
    G = torch.randn(2, 20, 50, generator=torch.Generator().manual_seed(0))
    G[1] = 0
    expected = G[0].double().norm().item() * 1e-30
    norms = torch.empty(2)
    orthogonalize(G * 1e-30, norms=norms)
    assert norms[0].item() == pytest.approx(expected, rel=1e-5)
    assert norms[1].item() == 0
    assert torch.linalg.vector_norm(G * 1e-30).item() == 0


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)])
def test_the_norms_it_forms_are_handed_out(shape):
    G = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    norms = torch.empty(3)
    orthogonalize(G, norms=norms)
    torch.testing.assert_close(norms, torch.linalg.vector_norm(G, dim=(-2, -1)))
    exact = torch.linalg.vector_norm(G, dim=(-2, -1), dtype=torch.float64)
    assert torch.equal(norms, exact.float())


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"coefficients": "newton"}, "polar_express"),
        ({"steps": 0}, "steps=0"),
        ({"form": "fast"}, "form='fast'"),
        ({"symmetric": "always"}, "symmetric='always'"),
        ({"segments": (2, 2)}, r"segments=\(2, 2\): expected 5"),
    ],
)
def test_wrong_choices_are_named_with_the_right_ones(kwargs, word):
    with pytest.raises(ValueError, match=word):
        orthogonalize(torch.randn(4, 8), **kwargs)


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"\(5,\)"):
        orthogonalize(torch.randn(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_stays_zero_where_subnormals_are_flushed(dtype):
    """As on a GPU and under the CPU host: an expert without tokens must not become NaN."""
    batch = torch.stack([torch.zeros(4, 8), torch.randn(4, 8), torch.full((4, 8), 1e-42)])
    torch.set_flush_denormal(True)
    try:
        found = orthogonalize(batch, dtype=dtype)
    finally:
        torch.set_flush_denormal(False)
    assert found[0].count_nonzero() == 0
    assert found.isfinite().all()
    assert found[1].float().norm() > 1
