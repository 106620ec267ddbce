"""FP8 storage of activations around Transformer Engine's grouped experts.

As ``tests/fp8/test_storage.py``, over the stand-ins: what TE's Python saves for backward, and what
becomes of it; on a GPU over TE itself. The last test is about what TE's Python stores by itself
when it computes in FP8, with the padding of the stand-ins' kernels.
"""

from dataclasses import replace

import pytest
import torch

from megatron_k2.fp8.tiles import stored_bytes
from megatron_k2.presets import K2_TINY
from tests.fp8.stored_experts import SIZES, expected, inputs, run, worst
from tests.support.devices import here
from tests.support.saved_tensors import saved_bytes
from tests.support.single_rank import one_rank
from tests.te.models import TE_FLAGS, local_name
from tests.te.worker import whole_weight

PRESET = replace(K2_TINY, num_layers=3, num_moe_experts=len(SIZES))


@pytest.fixture(scope="module", autouse=True)
def _rank(_transformer_engine):
    with one_rank():
        yield


def _experts(*flags, is_stored=False):
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_k2.model.build import K2ModelBuilder, model_config_from_args
    from tests.support.single_rank import arguments

    config = model_config_from_args(arguments(PRESET, *TE_FLAGS, *flags))
    config.transformer.bias_activation_fusion = True  # off on the CPU host, on wherever TE runs
    config.fp8_activation_storage = is_stored
    model = K2ModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    for name, param in model.named_parameters():
        param.data.copy_(whole_weight(local_name(name), list(param.shape)))
    return model.train().decoder.layers[1].mlp.experts


def _weights(experts):
    return [
        (getattr(experts.linear_fc1, f"weight{i}"), getattr(experts.linear_fc2, f"weight{i}"))
        for i in range(len(SIZES))
    ]


def test_forward_is_bit_equal_and_backward_is_the_chain_rule_through_fp8(host):
    plain, stored = _experts(), _experts(is_stored=True)
    given = [t.to(here()) for t in inputs(PRESET.hidden_size)]
    found = run(stored, *given)
    assert torch.equal(found[0], run(plain, *given)[0])
    grads = [[w.grad for w in pair] for pair in _weights(stored)]
    weights = [[w.detach() for w in pair] for pair in _weights(stored)]
    assert worst(found, grads, expected(weights, *given)) < 1e-5
    assert worst(found, grads, expected(weights, *given, is_stored=False)) > 1e-3, "plain is seen"


def _kept(experts, dtype):
    with saved_bytes() as total:
        run(experts, *(t.to(here()) for t in inputs(PRESET.hidden_size, dtype)))
        return total()


@pytest.mark.parametrize(("flags", "size"), [((), 4), (("--bf16",), 2)])
def test_only_the_two_activations_become_smaller(host, flags, size):
    dtype = torch.bfloat16 if flags else torch.float32
    plain, stored = (_kept(_experts(*flags, is_stored=on), dtype) for on in (False, True))
    rows, widths = sum(SIZES), (PRESET.hidden_size, 2 * PRESET.moe_ffn_hidden_size)
    assert plain - stored == sum(rows * w * size - stored_bytes(rows, w) for w in widths)


def test_what_te_computes_in_fp8_is_already_stored_so_only_swiglu_gains():
    from transformer_engine.common.recipe import Float8BlockScaling
    from transformer_engine.pytorch import autocast

    kept = []
    for is_stored in (False, True):
        flags = "--bf16 --fp8-format e4m3 --fp8-recipe blockwise".split()
        experts = _experts(*flags, is_stored=is_stored)
        with autocast(enabled=True, recipe=Float8BlockScaling()):
            kept.append(_kept(experts, torch.bfloat16))
    padded = sum(-(-size // 16) * 16 for size in SIZES)
    width = 2 * PRESET.moe_ffn_hidden_size
    assert kept[0] - kept[1] == padded * width * 2 - stored_bytes(padded, width)
