"""Restarts of the Gram form keep it safe in bf16, whatever the polynomials and the matrix.

The oracle is the plain form in the same dtype, whose ``R`` is always fresh. Wrong variants: one
segment too long, the two segments of five ``jordan`` steps the other way round, and a first ``R``
whose diagonal is left as rounding made it.

Not exercised: matrices above 256 rows, any GPU. (fp16 is emulated on CPU and slow: one small case.)
"""

from functools import cache

import pytest
import torch

from megatron_k2.optimizer.newton_schulz import iteration
from megatron_k2.optimizer.newton_schulz.coefficients import COEFFICIENTS, coefficient_set
from megatron_k2.optimizer.newton_schulz.gram_restarts import restart_segments
from megatron_k2.optimizer.newton_schulz.iteration import orthogonalize, raise_diagonal
from tests.oracles.polar import SPECTRA, matrix_with_spectrum, polar_factor

BF16 = torch.bfloat16
RUNS = [
    ("jordan", 5),
    ("jordan", 8),
    ("quintic", 5),
    ("polar_express", 5),
    ("polar_express", 8),
    ("deepseek_v4", 10),
]
LARGEST = 1.25
"""Singular value that none may exceed; ``jordan`` itself overshoots to 1.21."""


def segments_of(name, steps, dtype=BF16):
    return restart_segments(coefficient_set(name).take(steps), dtype)


@cache
def nearly_parallel_rows(n, m, num_parallel, deviation):
    """[16, n, m]: the first rows one vector up to ``deviation``, the others negligible."""
    g = torch.Generator().manual_seed(n * num_parallel)
    X = torch.randn(16, n, m, generator=g) * 1e-4
    common = torch.randn(16, 1, m, generator=g)
    X[:, :num_parallel] = common + deviation * torch.randn(16, num_parallel, m, generator=g)
    return X


PARALLEL = [
    (n, m, k, deviation)
    for n, m in ((2, 7), (16, 56), (64, 224))
    for k in (2, 4, 16, 64)
    if k <= n
    for deviation in (0.1, 0.07, 0.03, 0.01)
]


def largest_singular_value(results):
    """Over all matrices of all batches; infinity if one has diverged."""
    return max(
        torch.linalg.matrix_norm(Y.float(), 2).max().item() if Y.isfinite().all() else torch.inf
        for Y in results
    )


def on_parallel_rows(**kwargs):
    return largest_singular_value(
        orthogonalize(nearly_parallel_rows(*case), form="gram", dtype=BF16, **kwargs)
        for case in PARALLEL
    )


def error_and_largest(G, UVt, **kwargs):
    result = orthogonalize(G, **kwargs).double()
    error = ((result - UVt).norm() / UVt.norm()).item()
    return error, torch.linalg.matrix_norm(result, 2).item()


def test_the_placement_of_every_set():
    assert segments_of("jordan", 5) == (3, 2)
    assert segments_of("jordan", 1) == (1,)
    assert segments_of("quintic", 5) == (2, 1, 2)
    assert segments_of("polar_express", 5) == (2, 1, 2)
    assert segments_of("polar_express", 8) == (2, 1, 2, 2, 1)
    assert segments_of("deepseek_v4", 10) == (3, 2, 2, 2, 1)
    assert segments_of("jordan", 5, torch.float16) == (3, 2)
    assert segments_of("jordan", 5, torch.float32) == (5,)
    assert segments_of("deepseek_v4", 10, torch.float32) == (5, 5)
    for name, steps in RUNS:
        for dtype in (BF16, torch.float16, torch.float32):
            assert sum(segments_of(name, steps, dtype)) == steps


@pytest.mark.parametrize("spectrum", [*SPECTRA, "half_rank"])
@pytest.mark.parametrize(("name", "steps"), RUNS)
def test_bf16_is_as_orthogonal_as_the_plain_form(name, steps, spectrum):
    """Error at most 1.25 times the plain form's, and none of the singular values beyond 1.25."""
    G = matrix_with_spectrum(192, 672, spectrum).float()
    UVt = cached_polar_factor(spectrum)
    kwargs = {"coefficients": name, "steps": steps, "dtype": BF16}
    plain, _ = error_and_largest(G, UVt, form="plain", **kwargs)
    gram, largest = error_and_largest(G, UVt, form="gram", **kwargs)
    assert gram <= 1.25 * plain
    assert largest <= LARGEST


@cache
def cached_polar_factor(spectrum):
    return polar_factor(matrix_with_spectrum(192, 672, spectrum))


@pytest.mark.parametrize(("name", "steps"), RUNS)
def test_nearly_parallel_rows_do_not_diverge_in_bf16(name, steps):
    assert on_parallel_rows(coefficients=name, steps=steps) <= LARGEST


@pytest.mark.parametrize(
    ("name", "steps", "segments"),
    [
        ("jordan", 5, (2, 3)),
        ("jordan", 5, (4, 1)),
        ("jordan", 5, (5,)),
        ("quintic", 5, (3, 2)),
        ("polar_express", 5, (3, 2)),
        ("polar_express", 5, (2, 2, 1)),
        ("deepseek_v4", 10, (5, 5)),
    ],
)
def test_a_segment_beyond_the_limit_is_rejected(name, steps, segments):
    worst = on_parallel_rows(coefficients=name, steps=steps, segments=segments)
    for spectrum in SPECTRA:
        G = matrix_with_spectrum(192, 672, spectrum).float()
        kwargs = {"coefficients": name, "steps": steps, "segments": segments}
        result = orthogonalize(G, form="gram", dtype=BF16, **kwargs)
        worst = max(worst, largest_singular_value([result]))
    assert worst > LARGEST


@pytest.mark.parametrize("name", ["jordan", "polar_express"])
def test_without_the_raised_diagonal_they_diverge(monkeypatch, name):
    monkeypatch.setattr(iteration, "raise_diagonal", lambda R: None)
    assert on_parallel_rows(coefficients=name) > 2


def test_the_diagonal_rises_by_one_or_two_units_in_the_last_place_and_nothing_else_changes():
    R = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    R[:, 0, 0] = 0
    before = R.clone()
    raise_diagonal(R)
    units = R.diagonal(dim1=1, dim2=2).view(torch.int16) - before.diagonal(dim1=1, dim2=2).view(
        torch.int16
    )
    assert set(units[:, 1:].flatten().tolist()) <= {1, 2}
    assert not units[:, 0].any()
    off_diagonal = ~torch.eye(40, dtype=torch.bool)
    assert torch.equal(R[:, off_diagonal], before[:, off_diagonal])


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_tiny_huge_and_rank_deficient_inputs_stay_bounded_in_a_batch(name, scale):
    G = torch.stack(
        [matrix_with_spectrum(64, 160, s).float() for s in (*SPECTRA, "half_rank", "rank_one")]
    )
    G = torch.cat([G, torch.zeros_like(G[:1])])
    result = orthogonalize(G * scale, coefficients=name, form="gram", dtype=BF16)
    assert largest_singular_value([result]) <= LARGEST
    assert not result[-1].any()
    for matrix, alone in zip(G, result, strict=True):
        kwargs = {"coefficients": name, "form": "gram", "dtype": BF16}
        assert largest_singular_value([orthogonalize(matrix * scale, **kwargs)]) <= LARGEST
        assert alone.isfinite().all()


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_fp32_without_a_restart_equals_the_plain_form(spectrum):
    """To 1e-3 of the error: rounding 6e-8 times the amplification 2e4 of the ``jordan`` steps."""
    G = matrix_with_spectrum(192, 672, spectrum).float()
    UVt = cached_polar_factor(spectrum)
    for name, steps in RUNS:
        kwargs = {"coefficients": name, "steps": steps}
        plain, _ = error_and_largest(G, UVt, form="plain", **kwargs)
        gram, _ = error_and_largest(G, UVt, form="gram", **kwargs)
        assert gram <= plain + 1e-3


def test_fp16_stays_bounded():
    G = nearly_parallel_rows(16, 56, 2, 0.03)[:4]
    result = orthogonalize(G, form="gram", dtype=torch.float16)
    assert largest_singular_value([result]) <= LARGEST
