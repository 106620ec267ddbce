"""The TE spec against the local one: loss, every gradient, the optimizer's view of the parameters.

Both compute in fp32 with sums in another order: 1e-5 of a tensor's largest magnitude, the bound of
``tests/model/test_hf_parity.py`` (seen: 2e-6). Not exercised: TE's kernels, for which stand-ins
compute, and fused attention.
"""

from dataclasses import replace

import pytest

from tests.support.single_rank import SMALL, one_rank
from tests.te.models import largest_difference, local_name, loss_and_gradients, pair

UNEQUAL_EPSILONS = replace(SMALL, norm_epsilon=1e-2, latent_norm_epsilon=1e-1)
NO_QUERY_LATENT = replace(UNEQUAL_EPSILONS, q_lora_rank=None)


@pytest.fixture(scope="module", autouse=True)
def _rank(_transformer_engine):
    with one_rank():
        yield


def _differences(local, te, preset):
    expected_loss, expected = loss_and_gradients(local, preset)
    loss, found = loss_and_gradients(te, preset)
    return ((loss - expected_loss) / expected_loss).abs().item(), *largest_difference(
        found, expected
    )


@pytest.mark.parametrize(
    "preset", [UNEQUAL_EPSILONS, NO_QUERY_LATENT], ids=["query latent", "no query latent"]
)
def test_loss_and_every_gradient_equal_the_local_modules(host, preset):
    from tests.te.standin.extension import CALLS

    local, te = pair(preset=preset)
    CALLS.clear()
    of_loss, of_gradients, name = _differences(local, te, preset)
    if host == "stand-in":
        assert {"te_general_grouped_gemm", "generic_gemm", "rmsnorm_fwd"} <= set(CALLS)
    assert of_loss < 1e-6
    assert of_gradients < 1e-5, name


def test_the_local_model_reaches_no_te_kernel_but_the_routers_product():
    from tests.te.standin.extension import CALLS

    local, _ = pair()
    CALLS.clear()
    loss_and_gradients(local)
    # Megatron's router takes TE's product wherever TE is importable: three a router.
    assert CALLS == {"generic_gemm": 3 * 2}


def _one_expert_off(te):
    te.decoder.layers[1].mlp.experts.linear_fc1.weight3.data.mul_(1.01)


def _one_epsilon_for_all(te):
    for layer in te.decoder.layers:
        layer.self_attention.linear_kv_up_proj.eps = UNEQUAL_EPSILONS.norm_epsilon


@pytest.mark.parametrize("spoil", [_one_expert_off, _one_epsilon_for_all])
def test_a_model_that_is_not_the_same_is_seen(host, spoil):
    local, te = pair(preset=UNEQUAL_EPSILONS)
    spoil(te)
    _, of_gradients, _ = _differences(local, te, UNEQUAL_EPSILONS)
    assert of_gradients > 1e-4


def test_muon_takes_the_same_matrices_laid_out_alike():
    from megatron_k2.optimizer.param_groups import muon_matrices

    def layouts(model):
        names = {param: local_name(name) for name, param in model.named_parameters()}
        specs = muon_matrices([model]).items()
        return {names[param]: (tuple(param.shape), spec) for param, spec in specs}

    local, te = map(layouts, pair())
    assert te == local
    assert any(spec.is_expert for _, spec in te.values())


def test_dense_layers_norm_and_latents_norms_are_inside_te_linears():
    _, te = pair()
    fused = {name for name, _ in te.named_parameters() if name.endswith("layer_norm_weight")}
    layers = "decoder.layers."
    assert fused == {
        f"{layers}{i}.self_attention.linear_{latent}_up_proj.layer_norm_weight"
        for i in range(SMALL.num_layers)
        for latent in ("q", "kv")
    } | {f"{layers}0.mlp.linear_fc1.layer_norm_weight"}
