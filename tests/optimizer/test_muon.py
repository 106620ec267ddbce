"""Muon's step against a hand-written loop, the RMS it promises, and idle experts."""

import math

import pytest
import torch

from megatron_k2.optimizer.muon import (
    apply_update,
    idle_factor,
    muon_step,
    rms_match_scale,
    update_momentum,
)
from megatron_k2.optimizer.newton_schulz.iteration import orthogonalize
from tests.oracles.polar import polar_factor, polynomial_of_singular_values

JORDAN = ((3.4445, -4.7750, 2.0315),) * 5


def hand_written_steps(W, gradients, lr, weight_decay, mu, nesterov):
    """Algorithm 1 line by line in fp64, orthogonalising by SVD."""
    M = torch.zeros_like(W)
    for G in gradients:
        M = mu * M + G
        direction = G + mu * M if nesterov else M
        update = polynomial_of_singular_values(direction, JORDAN) * math.sqrt(max(W.shape)) * 0.2
        W = W - lr * (update + weight_decay * W)
    return W


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (30, 30)])
def test_three_steps_equal_the_hand_written_algorithm(shape, nesterov):
    """Inputs and steps in fp64; 1e-9 as for the iteration itself, times lr."""
    g = torch.Generator().manual_seed(0)
    W = torch.randn(shape, generator=g, dtype=torch.float64)
    gradients = [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3)]
    expected = hand_written_steps(W, gradients, 0.02, 0.1, 0.95, nesterov)
    momentum = torch.zeros_like(W)
    for G in gradients:
        muon_step(W, G, momentum, lr=0.02, weight_decay=0.1, mu=0.95, nesterov=nesterov, dtype=None)
    torch.testing.assert_close(W, expected, rtol=0, atol=1e-10)


def test_decay_scaled_by_the_rms_factor_would_be_seen():
    g = torch.Generator().manual_seed(0)
    W = torch.randn(24, 60, generator=g, dtype=torch.float64)
    G = torch.randn(24, 60, generator=g, dtype=torch.float64)
    expected = hand_written_steps(W, [G], 0.02, 0.1, 0.95, True)
    wrong = W.clone()
    lr = 0.02 * rms_match_scale(24, 60)
    apply_update(wrong, orthogonalize(1.95 * G), lr, 0.1)
    assert (wrong - expected).abs().max() > 1e-3


def test_momentum_is_a_sum_in_place_and_nesterov_looks_ahead():
    M = torch.full((4,), 2.0)
    G = torch.full((4,), 1.0)
    direction = update_momentum(M, G, 0.5, nesterov=True)
    assert M.tolist() == [2.0] * 4
    assert direction.tolist() == [2.0] * 4
    assert update_momentum(M, G, 0.5, nesterov=False) is M


def test_bf16_gradients_accumulate_in_an_fp32_momentum():
    M = torch.zeros(8)
    G = torch.full((8,), 0.01).bfloat16()
    direction = update_momentum(M, G, 0.95, nesterov=True)
    assert direction.dtype == torch.float32
    assert torch.equal(M, G.float())


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (30, 30)])
def test_update_of_the_exact_polar_factor_has_rms_one_fifth(shape):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    update = polar_factor(G) * rms_match_scale(*shape)
    assert update.square().mean().sqrt().item() == pytest.approx(0.2, abs=1e-12)


def test_equals_torch_optim_muon_with_momentum_to_rounding():
    """torch keeps (1 − μ) M: the direction differs in rounding, which bf16 steps turn into 2⁻⁸."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(48, 128))
    ours, momentum = weight.detach().clone(), torch.zeros(48, 128)
    start = ours.clone()
    theirs = torch.optim.Muon([weight], lr=0.02, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        weight.grad = torch.randn(48, 128)
        theirs.step()
        muon_step(ours, weight.grad, momentum, lr=0.02)
    moved = (weight.detach() - start).norm()
    assert ((ours - weight.detach()).norm() / moved).item() < 0.02


def travel(num_idle_steps, idle_floor, gradient_scale=1.0):
    """Full steps' worth of path of one expert that got 50 gradients and then none."""
    g = torch.Generator().manual_seed(0)
    W = torch.zeros(16, 32)
    momentum, peak = torch.zeros(16, 32), torch.zeros(())
    for _ in range(50):
        G = torch.randn(16, 32, generator=g) * gradient_scale
        muon_step(W, G, momentum, lr=1.0, weight_decay=0.0, dtype=None, peak_norm=peak)
    path, full = 0.0, 0.0
    for _ in range(num_idle_steps):
        before = W.clone()
        muon_step(
            W,
            torch.zeros(16, 32),
            momentum,
            lr=1.0,
            weight_decay=0.0,
            dtype=None,
            peak_norm=peak,
            idle_floor=idle_floor,
        )
        step = (W - before).norm().item()
        full = full or step
        path += step / full
    return path


def test_idle_expert_stops_where_stock_muon_marches_on():
    """The docstring's bounds; without a floor, one full step per step, past underflow too."""
    assert travel(2500, 0.0) == pytest.approx(2500, rel=0.02)
    assert 60 < travel(600, 0.1) < 81
    assert travel(100, 0.5) < 42


def test_idle_damping_does_not_depend_on_the_gradients_scale():
    assert travel(200, 0.1, 1e-20) == pytest.approx(travel(200, 0.1), rel=1e-3)


def test_fed_matrix_is_bit_identical_with_and_without_the_floor():
    """Norms that vary sevenfold from step to step, and fall threefold over the run."""
    g = torch.Generator().manual_seed(0)
    W = torch.randn(3, 16, 32, generator=g)
    twin = W.clone()
    M, M_twin, peak = torch.zeros_like(W), torch.zeros_like(W), torch.zeros(3)
    for t in range(200):
        G = torch.randn(3, 16, 32, generator=g) * math.exp(math.sin(t) - t / 180)
        muon_step(W, G, M, lr=0.02, peak_norm=peak)
        muon_step(twin, G, M_twin, lr=0.02)
    assert torch.equal(W, twin)
    assert (peak > 0).all()


def test_only_the_idle_expert_of_a_batch_is_damped_and_waking_restores_it():
    peak = torch.zeros(2)
    norm = torch.tensor([10.0, 10.0])
    for _ in range(150):
        norm = norm * torch.tensor([1.0, 0.95])
        factor = idle_factor(norm, peak)
    assert factor[0].item() == 1.0
    assert factor[1].item() == pytest.approx(min(1.0, (0.95 / 0.99) ** 149 / 0.1), rel=1e-3)
    assert idle_factor(torch.tensor([10.0, 10.0]), peak).tolist() == [1.0, 1.0]


def _norm(X):
    """‖X‖_F of one matrix, its squares in fp64, where those of subnormals do not underflow."""
    return torch.linalg.vector_norm(X, dtype=torch.float64).float()


def test_expert_idle_long_enough_for_the_peak_to_reach_its_stuck_momentum_stays_put():
    momentum, peak = torch.ones(1, 512), torch.zeros(())
    factor = torch.ones(())
    for _ in range(12_000):
        momentum.mul_(0.95)
        factor = idle_factor(_norm(momentum), peak)
    assert (momentum > 0).all()
    assert factor.item() == 0
    assert _norm(momentum) >= 0.1 * peak, "by the ratio alone it would march again"


def test_matrix_without_any_gradient_yet_gives_no_nan():
    assert idle_factor(torch.zeros(2), torch.zeros(2)).tolist() == [0.0, 0.0]


def test_floor_zero_disables_and_keeps_the_state():
    peak = torch.tensor([7.0])
    assert idle_factor(torch.tensor([1e-9]), peak, floor=0).tolist() == [1.0]
    assert peak.tolist() == [7.0]
