"""The planner's activation rows against what autograd really keeps of Transformer Engine's modules.

Bytes are those of the storages that saved tensors lie in, once each and at the end of the forward,
parameters aside. What the core attention keeps is left out on both sides: the stand-in's attention
is the unfused one. Wrong variants: a plan that recomputes nothing, or stores nothing in FP8, where
the model does. Not exercised: a GPU's fused router and permutation.
"""

import pytest
import torch
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

from megatron_k2.planning.cost.activations import (
    attention_rows,
    head_rows,
    kept_bytes,
    mlp_rows,
)
from megatron_k2.presets import get_preset
from megatron_k2.selfcheck import one_rank as one_rank_of_megatron
from tests.support.saved_tensors import saved_bytes
from tests.support.single_rank import build, one_rank
from tests.te.models import TE_FLAGS, batch, token_losses

SEQUENCE = 256
IN_CORE_ATTENTION = {"query", "key", "value", "softmax statistics"}
MODULES = {"norm": "layernorm", "swiglu": "moe_act", "mla_up": "mla_up_proj"}


@pytest.fixture(scope="module", autouse=True)
def _rank():
    with one_rank():
        yield


@pytest.fixture
def fused_swiglu(monkeypatch):
    """As on a GPU: the CPU's flags switch it off, for want of a compiler."""

    def flags(*, cuda):
        return [flag for flag in platform_flags(cuda=cuda) if flag != "--no-bias-swiglu-fusion"]

    platform_flags = one_rank_of_megatron.platform_flags
    monkeypatch.setattr(one_rank_of_megatron, "platform_flags", flags)
    with torch._dynamo.config.patch(disable=True):
        yield
    destroy_moe_metrics_tracker()  # it has as many rows as the first model had layers


def left_out(module):
    """From here on nothing that ``module`` saves is counted."""
    compute = module.forward

    def forward(*args, **kwargs):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            return compute(*args, **kwargs)

    module.forward = forward


def kept_by_autograd(model, preset):
    """Bytes a token that one forward leaves for the backward, core attention aside."""
    for name, module in model.named_modules():
        if name.endswith("core_attention"):
            left_out(module)
    with saved_bytes(model) as total:
        loss = token_losses(model, *batch(preset, sequence=SEQUENCE, size=1))
        kept = total()
    del loss
    return kept / SEQUENCE


def planned(preset, recompute, fp8_storage=False):
    rows = []
    for layer in range(preset.num_layers):
        rows += attention_rows(preset, 1)
        rows += mlp_rows(preset, 1, is_moe=layer >= preset.num_dense_layers)
    rows += head_rows(preset, 1)
    left = [row for row in rows if row.name not in IN_CORE_ATTENTION]
    return kept_bytes(iter(left), frozenset(recompute), fp8_storage=fp8_storage)


ALL = ("norm", "swiglu", "mla_up")
PARTS = [(), ("norm",), ("mla_up",), ("swiglu",), ALL]
CASES = [("k2-tiny", part, fp8) for part in PARTS for fp8 in (False, True)]


@pytest.mark.parametrize(
    ("name", "recompute", "fp8"), [*CASES, ("k2-mini", (), False), ("k2-mini", ALL, True)]
)
def test_activation_bytes_are_autograds_within_two_per_cent(
    host, fused_swiglu, name, recompute, fp8
):
    preset = get_preset(name)
    flags = ["--recompute-granularity", "selective"] if recompute else []
    flags += ["--recompute-modules", *(MODULES[r] for r in recompute)] if recompute else []
    flags += ["--fp8-activation-storage"] if fp8 else []
    model = build(preset, *TE_FLAGS, "--bf16", *flags).train()
    found = kept_by_autograd(model, preset)
    assert found == pytest.approx(planned(preset, recompute, fp8), rel=0.02)
    if recompute:
        assert found != pytest.approx(planned(preset, (), fp8), rel=0.02)
    if fp8:
        assert found != pytest.approx(planned(preset, recompute), rel=0.02)
