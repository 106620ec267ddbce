"""The orthogonal polar factor by SVD, and matrices of a chosen spectrum."""

from functools import cache

import torch
from torch import Tensor

SPECTRA = ("gaussian", "power_1", "power_2", "condition_1e3")


def polar_factor(G: Tensor) -> Tensor:
    """U Vᵀ of G = U S Vᵀ, fp64: what Newton-Schulz approximates, by another method."""
    U, _, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    return U @ Vh


@cache
def matrix_with_spectrum(rows: int, cols: int, spectrum: str, seed: int = 0) -> Tensor:
    """[rows, cols] fp64 with random singular vectors; largest singular value 1 unless gaussian.

    Cached: treat as read-only.
    """
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    if spectrum == "gaussian":
        return X
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    values = {
        "power_1": 1.0 / torch.arange(1, len(S) + 1, dtype=torch.float64),
        "power_2": torch.arange(1, len(S) + 1, dtype=torch.float64) ** -2,
        "condition_1e3": torch.logspace(0, -3, len(S), dtype=torch.float64),
        "half_rank": (torch.arange(len(S)) < len(S) // 2).double(),
        "rank_one": (torch.arange(len(S)) < 1).double(),
    }[spectrum]
    return (U * values) @ Vh


def polynomial_of_singular_values(
    G: Tensor, per_step: tuple[tuple[float, float, float], ...]
) -> Tensor:
    """U p(S / ‖G‖_F) Vᵀ, fp64: the iteration's exact result, by polynomials of numbers."""
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    s = S / G.double().norm()
    for a, b, c in per_step:
        s = a * s + b * s**3 + c * s**5
    return (U * s) @ Vh
