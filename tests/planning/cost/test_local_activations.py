"""The planner's rows of the local modules against what autograd keeps of them, on a CPU.

Storages of saved tensors, once each, at the end of a forward; parameters aside, nothing else left
out. The same hooks over Transformer Engine's modules: ``tests/te/test_activations.py``. Wrong
variants: a plan that recomputes nothing, or stores nothing in FP8, where the model does.
"""

import pytest
import torch
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

from megatron_k2.host.repairs import recompute_without_te
from megatron_k2.planning.cost.activations import kept_bytes
from megatron_k2.planning.cost.local_activations import local_head_rows, local_rows
from megatron_k2.presets import get_preset
from tests.support.saved_tensors import saved_bytes
from tests.support.single_rank import build, one_rank

SEQUENCE = 256
MODULES = {"norm": "layernorm", "swiglu": "moe_act"}
TOKEN_IDS = 8
EXACT = 1e-3
"""The aim is 2 %; on a CPU every tensor is known."""


@pytest.fixture(scope="module", autouse=True)
def _rank():
    with one_rank():
        recompute_without_te()
        yield


@pytest.fixture(autouse=True)
def _forget_the_other_presets_layers():
    yield
    destroy_moe_metrics_tracker()  # it has as many rows as the first model had layers


def kept_by_autograd(preset, *flags):
    """Bytes a token that one forward leaves for the backward."""
    model = build(preset, "--muonclip", "--moe-grouped-gemm", *flags).train()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(preset.vocab_size, (1, SEQUENCE + 1), generator=generator)
    positions = torch.arange(SEQUENCE)[None]
    with saved_bytes(model) as total:
        loss = model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:])
        kept = total()
    del loss
    return kept / SEQUENCE


def planned(preset, recompute, *, fp8_storage, element_bytes):
    rows = []
    for layer in range(preset.num_layers):
        is_moe = layer >= preset.num_dense_layers
        rows += local_rows(
            preset, 1, is_moe=is_moe, element_bytes=element_bytes, is_swiglu_fused=fp8_storage
        )
    rows += local_head_rows(preset, 1, element_bytes)
    kept = kept_bytes(
        iter(rows), frozenset(recompute), fp8_storage=fp8_storage, element_bytes=element_bytes
    )
    return TOKEN_IDS + kept


BOTH = ("norm", "swiglu")
SETTINGS = [((), False), (("norm",), False), (("swiglu",), False), ((), True), (BOTH, True)]
CASES = [("k2-tiny", dtype, *setting) for dtype in ("fp32", "bf16") for setting in SETTINGS]


@pytest.mark.parametrize(
    ("name", "dtype", "recompute", "fp8"),
    [
        *CASES,
        pytest.param("k2-mini", "fp32", (), False, marks=pytest.mark.slow),
        ("k2-mini", "bf16", BOTH, True),
    ],
)
def test_activation_bytes_are_autograds(name, dtype, recompute, fp8):
    preset, element_bytes = get_preset(name), {"fp32": 4, "bf16": 2}[dtype]
    flags = ["--bf16"] if dtype == "bf16" else []
    flags += ["--fp8-activation-storage"] if fp8 else []
    if recompute:
        flags += ["--recompute-granularity", "selective"]
        flags += ["--recompute-modules", *(MODULES[module] for module in recompute)]
    found = kept_by_autograd(preset, *flags)
    sizes = {"fp8_storage": fp8, "element_bytes": element_bytes}
    assert found == pytest.approx(planned(preset, recompute, **sizes), rel=EXACT)
    if recompute:
        assert found != pytest.approx(planned(preset, (), **sizes), rel=EXACT)
    if fp8:
        plain = planned(preset, recompute, fp8_storage=False, element_bytes=element_bytes)
        assert found != pytest.approx(plain, rel=EXACT)
