"""FP8 storage of the experts' activations: forward bit-equal, backward by the chain rule, bytes.

Gradients against the chain rule written out in fp64 with the two activations taken through FP8:
1e-5 of a tensor's largest magnitude, as for fp32 products elsewhere. Transformer Engine's experts
are in ``tests/te/test_fp8_storage.py``. Not exercised: GPUs.
"""

import copy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from megatron_k2.errors import UserError
from megatron_k2.fp8.tiles import stored_bytes
from megatron_k2.host.cpu import megatron_host
from megatron_k2.presets import K2_TINY
from tests.fp8.stored_experts import SIZES, expected, inputs, run, worst
from tests.support.saved_tensors import saved_bytes
from tests.support.single_rank import SMALL, build, one_rank, randomise


@pytest.fixture(scope="module", autouse=True)
def _rank():
    with one_rank():
        yield


def _grouped():
    model = build(SMALL).train()
    randomise(model)
    return model.decoder.layers[1].mlp.experts


def _looped():
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.process_groups_config import ProcessGroupCollection

    grouped = _grouped()
    config = copy.deepcopy(grouped.config)
    config.bias_activation_fusion = True
    experts = LocalSpecProvider().grouped_mlp_modules(False)(
        len(SIZES), config, pg_collection=ProcessGroupCollection.use_mpu_process_groups()
    )
    experts.load_state_dict(grouped.state_dict())
    return experts.train()


def _stored(experts):
    from megatron_k2.fp8.storage import _keep_in_fp8

    _keep_in_fp8(experts, 2 * SMALL.moe_ffn_hidden_size, is_input_stored=True)
    return experts


def _weights(experts):
    return [(e.linear_fc1.weight, e.linear_fc2.weight) for e in experts.local_experts]


@pytest.mark.parametrize("make", [_grouped, _looped])
def test_forward_is_bit_equal_and_backward_is_the_chain_rule_through_fp8(make):
    plain, stored = make(), _stored(make())
    given = inputs(SMALL.hidden_size)
    found = run(stored, *given)
    assert torch.equal(found[0], run(plain, *given)[0])
    grads = [[w.grad for w in pair] for pair in _weights(stored)]
    weights = [[w.detach() for w in pair] for pair in _weights(stored)]
    assert worst(found, grads, expected(weights, *given)) < 1e-5
    assert worst(found, grads, expected(weights, *given, is_stored=False)) > 1e-3, "plain is seen"


@pytest.mark.parametrize("make", [_grouped, _looped])
def test_only_the_two_activations_become_smaller(make):
    rows, h, f = sum(SIZES), SMALL.hidden_size, SMALL.moe_ffn_hidden_size
    kept = []
    for experts in (make(), _stored(make())):
        with saved_bytes() as total:
            run(experts, *inputs(h))
            kept.append(total())
    saving = rows * (h + 2 * f) * 4 - stored_bytes(rows, h) - stored_bytes(rows, 2 * f)
    assert kept[0] - kept[1] == saving


def test_what_is_not_trained_is_not_quantised():
    experts = _stored(_grouped())
    with torch.no_grad(), saved_bytes() as total:
        experts(inputs(SMALL.hidden_size)[0], torch.tensor(SIZES), inputs(SMALL.hidden_size)[1])
        assert total() == 0


def _loss(model, preset):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(preset.vocab_size, (2, 33), generator=generator)
    positions = torch.arange(32).expand(2, -1)
    with saved_bytes() as total:
        loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()
        kept = total()
    loss.backward()
    return loss.detach(), kept


@pytest.mark.parametrize("dtype_flags", [[], ["--bf16"]], ids=["fp32", "bf16"])
def test_the_flag_saves_the_bytes_of_the_formula_in_a_whole_model(dtype_flags):
    """k2-tiny, where gate and up together are as wide as the hidden states and as the weights."""
    preset = replace(K2_TINY, num_layers=3, num_moe_experts=8)
    results = []
    for is_stored in (False, True):
        model = build(preset, *dtype_flags, "--fp8-activation-storage").train()
        if not is_stored:
            model = _without_storage(model)
        randomise(model)
        results.append(_loss(model, preset))
    (plain_loss, plain), (loss, stored) = results
    assert torch.equal(loss, plain_loss)
    tokens, size = 2 * 32, 2 if dtype_flags else 4

    def saving(rows, width):
        return rows * width * size - stored_bytes(rows, width)

    routed = tokens * preset.moe_router_topk
    a_moe_layer = (
        saving(routed, preset.hidden_size)
        + saving(routed, 2 * preset.moe_ffn_hidden_size)
        + saving(tokens, 2 * preset.moe_shared_expert_intermediate_size)
    )
    dense = saving(tokens, 2 * preset.ffn_hidden_size)
    assert plain - stored == preset.num_moe_layers * a_moe_layer + preset.num_dense_layers * dense


def _without_storage(model):
    """The same modules, each computing by its class's own forward again."""
    for module in model.modules():
        vars(module).pop("forward", None)
    return model


def _config(**changes):
    plain = {
        "use_te_activation_func": False,
        "transformer_impl": "transformer_engine",
        "activation_func_fp8_input_store": False,
    }
    return SimpleNamespace(**plain | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_te_activation_func": True}, "only Megatron's fused SwiGLU"),
        ({"activation_func_fp8_input_store": True}, "cast without scales"),
    ],
)
def test_what_would_not_be_stored_or_twice_is_refused(changes, message):
    from megatron_k2.fp8.storage import check_storable

    check_storable(_config())
    with pytest.raises(UserError, match=message):
        check_storable(_config(**changes))


def test_megatrons_recomputation_of_the_activation_reads_the_stored_input():
    """What ``--recompute-modules moe_act`` does, on one SwiGLU."""
    from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    from megatron_k2.fp8.pack import ActivationStorage, restore, store

    gate_up, probs = torch.randn(6, 40), torch.rand(6, 1)

    def gradient(source, hooks):
        leaf, weight = source.clone().requires_grad_(), torch.ones(20, 3, requires_grad=True)
        checkpoint = CheckpointWithoutOutput(fp8=None)  # else needs Transformer Engine
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            activated = checkpoint.checkpoint(
                partial(weighted_bias_swiglu_impl, bias=None, weights=probs), leaf * 1
            )
            out = activated @ weight
            checkpoint.discard_output_and_register_recompute(out)
        out.sum().backward()
        return leaf.grad, weight.grad

    storage = ActivationStorage(torch.empty(1), 40, is_input_stored=True)
    same = (lambda t: t, lambda t: t)
    with megatron_host():  # on a CPU: nothing is compiled
        found = gradient(gate_up, (storage.pack, storage.unpack))
        through = gradient(restore(store(gate_up)), same)
        other = gradient(gate_up, same)
    for a, b in zip(found, through, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(found[0], other[0])
