"""Clipping's scope against its formula: which gradients reach the optimizers, scaled by what.

The norm is over all gradients in both scopes. What an optimizer was given is read off its momentum
and first moment after one step from zero state: M = G, and exp_avg = (1 - β1) G.
"""

import math

import pytest
import torch

from tests.optimizer.test_muonclip import _built_with_hooks, _is_matrix, _set_gradients, _set_maxima
from tests.support.single_rank import one_rank

BETA1 = 0.9
CLIP = 0.5


@pytest.fixture(scope="module", autouse=True)
def _rank():
    with one_rank():
        yield


def _states(optimizer, ddp):
    """(name, what its optimizer was given as gradient), flat."""
    found = {}
    for part in optimizer.chained_optimizers:
        for name, param in ddp.named_parameters():
            if hasattr(part, "model_param_group_index_map"):
                if param not in part.model_param_group_index_map:
                    continue
                main, _ = part._shard(param)
            else:
                main = param
            state = part.optimizer.state.get(main, {})
            if "momentum_buffer" in state:
                found[name] = state["momentum_buffer"].flatten()
            elif "exp_avg" in state:
                found[name] = state["exp_avg"].flatten() / (1 - BETA1)
    return found


def _run(scope, is_sharded, limit=CLIP):
    extra = ["--clip-grad", str(limit), "--clip-grad-scope", scope]
    ddp, optimizer, hooks = _built_with_hooks(is_sharded, extra)
    _set_gradients(ddp, 0)
    _set_maxima(hooks.max_logits, 0)
    gradients = {name: p.main_grad.clone() for name, p in ddp.named_parameters()}
    success, norm, _ = optimizer.step()
    assert success
    total, work = hooks.step_log.chain.reduce_adamw_square_sum()
    work.wait()
    return gradients, _states(optimizer, ddp), norm, total.sqrt().item()


def _norm(tensors):
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))


def _scale_of(gradients, states):
    """(Muon's, AdamW's): the one factor between gradient and what was used."""
    factors = {True: [], False: []}
    for name, used in states.items():
        gradient = gradients[name]
        factors[_is_matrix(name, gradient)].append(
            (used @ gradient.flatten() / gradient.square().sum()).item()
        )
    return factors


@pytest.mark.parametrize("is_sharded", [False, True], ids=["plain", "over DistributedOptimizer"])
@pytest.mark.parametrize("scope", ["all", "adam"])
def test_the_scope_scales_the_gradients_it_names_by_the_global_factor(scope, is_sharded):
    gradients, states, norm, adamw_norm = _run(scope, is_sharded)
    assert states.keys() == gradients.keys()
    everything = _norm(gradients.values())
    assert float(norm) == pytest.approx(everything, rel=1e-5)
    adams = [g for name, g in gradients.items() if not _is_matrix(name, g)]
    assert adamw_norm == pytest.approx(_norm(adams), rel=1e-5)
    factor = CLIP / (everything + 1e-6)
    assert factor < 0.1  # both scopes and none are far apart
    found = _scale_of(gradients, states)
    assert found[False] == pytest.approx([factor] * len(found[False]), rel=1e-4)
    of_muon = factor if scope == "all" else 1.0
    assert found[True] == pytest.approx([of_muon] * len(found[True]), rel=1e-4)


@pytest.mark.parametrize("is_sharded", [False, True], ids=["plain", "over DistributedOptimizer"])
def test_nothing_is_scaled_below_the_limit(is_sharded):
    gradients, states, _, _ = _run("adam", is_sharded, limit=1e6)
    found = _scale_of(gradients, states)
    assert found[False] == pytest.approx([1.0] * len(found[False]), rel=1e-5)


def test_matrices_are_not_empty_of_gradient():
    """Else a factor of 0/0 would pass nothing at all."""
    gradients, _, _, _ = _run("all", False)
    assert all(torch.count_nonzero(g) for g in gradients.values())
