"""Megatron's selective recomputation with Transformer Engine's modules, and with FP8 storage.

The same operations run twice on the same numbers: gradients and S_max bit-equal. Bytes are those
that TE's Python saves; its fused attention, which is not run here, saves other tensors than the
unfused one.
"""

import pytest
import torch

from tests.support.devices import is_same
from tests.support.saved_tensors import saved_bytes
from tests.support.single_rank import SMALL, one_rank
from tests.te.models import TE_FLAGS, batch, differing, local_name, token_losses
from tests.te.worker import whole_weight


@pytest.fixture(scope="module", autouse=True)
def _rank(_transformer_engine):
    with one_rank():
        yield


def train(*modules, is_stored=False):
    """Loss, gradients, S_max, and bytes kept for backward, of one micro-batch."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_k2.model.build import K2ModelBuilder, model_config_from_args
    from megatron_k2.optimizer.qk_clip.max_logits import MaxLogits
    from tests.support.single_rank import arguments

    flags = ["--recompute-granularity", "selective", "--recompute-modules", *modules]
    config = model_config_from_args(arguments(SMALL, *TE_FLAGS, *(flags if modules else [])))
    config.transformer.bias_activation_fusion = True  # off on the CPU host, on wherever TE runs
    config.fp8_activation_storage = is_stored
    model = K2ModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    for name, param in model.named_parameters():
        param.data.copy_(whole_weight(local_name(name), list(param.shape)))
    maxima = MaxLogits([model.train()])
    with saved_bytes() as total:
        loss = token_losses(model, *batch()).mean()
        kept = total()
    loss.backward()
    gradients = {name: param.grad for name, param in model.named_parameters()}
    return loss.detach(), gradients, maxima.take(torch.distributed.group.WORLD), kept


@pytest.fixture(scope="module")
def plain(_rank):
    return train()


CASES = [
    ("layernorm",),
    ("mla_up_proj",),
    ("moe_act",),
    ("mlp",),
    ("layernorm", "mla_up_proj", "moe_act", "mlp"),
]


def _check_equal(found, expected):
    assert is_same(found[0], expected[0])
    assert not differing(found[1], expected[1])
    assert is_same(found[2], expected[2])


@pytest.mark.parametrize("modules", CASES, ids=" ".join)
def test_gradients_and_maximum_logits_are_bit_equal_and_fewer_bytes_are_kept(host, plain, modules):
    found = train(*modules)
    _check_equal(found, plain)
    assert found[3] < plain[3]


def test_the_experts_activation_frees_the_down_projections_input(plain):
    """SwiGLU's output, [tokens, width] a layer: the report's recomputed MoE down-projection."""
    *_, kept = train("moe_act")
    tokens = 2 * 32 * SMALL.moe_router_topk
    assert plain[3] - kept == SMALL.num_moe_layers * tokens * SMALL.moe_ffn_hidden_size * 4


def test_with_fp8_storage_the_activation_is_recomputed_from_what_is_stored(host, plain):
    """Forward and S_max untouched; gradients those of storage alone, of which the output's
    recomputation changes the down-projection's: its input is made of the stored numbers."""
    stored, both = train(is_stored=True), train("moe_act", is_stored=True)
    assert is_same(both[0], plain[0])
    assert is_same(both[2], plain[2])
    assert both[3] < stored[3] < plain[3]
    changed = differing(both[1], stored[1])
    assert any(".experts.linear_fc2." in name for name in changed)
    assert not any(n.endswith("experts.linear_fc1.weight0") and "layers.2" in n for n in changed)
