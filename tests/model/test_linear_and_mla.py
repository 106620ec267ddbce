"""The replicated linear layer, and what K2's attention builds, on one rank.

Gradients over two ranks are in ``test_layer_on_two_ranks.py``, values against an independent model
in ``test_hf_parity.py``.
"""

from dataclasses import replace

import pytest
import torch

from megatron_k2.model.linear import ReplicatedLinear
from tests.support.devices import DEVICES, here
from tests.support.single_rank import SMALL, build, one_rank


@pytest.fixture(scope="module", autouse=True, params=DEVICES)
def _rank(request):
    with one_rank(request.param):
        yield


def _linear(**config):
    from megatron.core.transformer.transformer_config import TransformerConfig

    shared = {"num_layers": 1, "hidden_size": 6, "num_attention_heads": 2}
    linear = ReplicatedLinear(
        6,
        4,
        config=TransformerConfig(
            **shared, params_dtype=torch.float64, use_cpu_initialization=True, **config
        ),
        init_method=torch.nn.init.normal_,
    )
    return linear.to(here())


def test_replicated_linear_multiplies_by_the_transpose():
    linear = _linear()
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    out, bias = linear(x)
    assert bias is None
    torch.testing.assert_close(
        out, torch.einsum("sbi,oi->sbo", x, linear.weight), rtol=1e-13, atol=1e-14
    )
    direction = torch.randn_like(out)
    grad_x, grad_weight = torch.autograd.grad(out, (x, linear.weight), direction)
    expected = torch.einsum("sbo,sbi->oi", direction, x)
    torch.testing.assert_close(grad_weight, expected, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(grad_x, direction @ linear.weight, rtol=1e-13, atol=1e-14)


def test_replicated_linear_is_drawn_by_the_given_initialiser_unless_told_not_to():
    assert _linear().weight.std() > 0.3
    marker = []
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=6,
        num_attention_heads=1,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    ReplicatedLinear(6, 4, config=config, init_method=marker.append)
    assert marker == []


def test_replicated_linear_is_saved_whole():
    entry = _linear().sharded_state_dict("down.")["down.weight"]
    assert entry.global_shape == entry.local_shape == (4, 6)
    assert entry.global_offset == (0, 0)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_only_sequence_parallelism_marks_the_weight_for_a_sum(sequence_parallel):
    size = 2 if sequence_parallel else 1
    linear = _linear(sequence_parallel=sequence_parallel, tensor_model_parallel_size=size)
    assert linear.weight.sequence_parallel is sequence_parallel


def test_latent_norms_have_their_own_epsilon_and_no_other_norm_has():
    preset = replace(SMALL, norm_epsilon=1e-5, latent_norm_epsilon=3e-6)
    model = build(preset)
    found = {name: module.eps for name, module in model.named_modules() if hasattr(module, "eps")}
    latent = {
        name: eps for name, eps in found.items() if name.endswith(("q_layernorm", "kv_layernorm"))
    }
    assert len(latent) == 2 * preset.num_layers
    assert set(latent.values()) == {3e-6}
    assert {eps for name, eps in found.items() if name not in latent} == {1e-5}


def test_a_query_without_latent_has_one_projection_and_no_norm():
    attention = build(replace(SMALL, q_lora_rank=None)).decoder.layers[0].self_attention
    modules = {name for name, _ in attention.named_children()}
    assert "linear_q_proj" in modules
    assert not modules & {"linear_q_down_proj", "linear_q_up_proj", "q_layernorm"}
