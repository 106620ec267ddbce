"""The TE spec over two ranks against the local modules on one: loss and every gradient.

fp32, sums in another order: 1e-5 of a tensor's largest magnitude, as in ``test_parity.py``. Not
exercised: both at once, communication overlapped with TE's GEMMs.
"""

import pytest
import torch

from tests.support.distributed import BACKENDS, run_ranks
from tests.support.single_rank import SMALL, build, one_rank
from tests.te.models import LOCAL_FLAGS, batch, largest_difference, token_losses
from tests.te.worker import FLAGS, LAYOUTS, whole_weight

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module", params=BACKENDS)
def results(request, _transformer_engine, tmp_path_factory):
    root = tmp_path_factory.mktemp("te_ranks")
    payload = [{"case": layout, "out": str(root / layout)} for layout in LAYOUTS]
    run_ranks("tests.te.worker", 2, payload, root / "logs", request.param)
    return {
        layout: [torch.load(root / layout / f"{rank}.pt") for rank in range(2)]
        for layout in LAYOUTS
    }


@pytest.fixture(scope="module")
def expected(_transformer_engine):
    with one_rank():
        model = build(SMALL, *LOCAL_FLAGS, *FLAGS).train()
        for name, param in model.named_parameters():
            param.data.copy_(whole_weight(name, list(param.shape)))
        loss = token_losses(model, *batch()).mean()
        loss.backward()
        found = {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()}
        return {name: value.cpu() for name, value in found.items()}


def _whole(of_ranks):
    """All ranks' gradients; under expert parallelism each has its own experts."""
    merged = {}
    for found in of_ranks:
        merged |= {n: g for n, g in found.items() if not n.startswith("unreduced")}
    return merged | {"loss": torch.stack([found["loss"] for found in of_ranks]).mean()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_equal_the_local_modules_on_one(results, expected, layout):
    difference, name = largest_difference(_whole(results[layout]), expected)
    assert difference < 1e-5, name


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("TP2+SP", "decoder.layers.1.self_attention.linear_kv_down_proj.weight"),
        ("TP2+SP", "decoder.layers.1.self_attention.q_layernorm.weight"),
        ("TP2+SP", "decoder.layers.1.mlp.experts.local_experts.0.linear_fc1.weight"),
        ("TP2+SP", "decoder.layers.1.mlp.router.weight"),
        ("EP2", "decoder.layers.1.mlp.router.weight"),
    ],
)
def test_one_ranks_gradient_alone_is_not_the_whole(results, expected, layout, name):
    alone = results[layout][0][f"unreduced {name}"] / (2 if layout == "EP2" else 1)
    difference, _ = largest_difference({name: alone}, {name: expected[name]})
    assert difference > 1e-2


def test_experts_numbered_from_zero_on_every_rank_are_seen(results, expected):
    layer = "decoder.layers.1.mlp.experts.local_experts"
    first_of_second_rank = f"{layer}.{SMALL.num_moe_experts // 2}.linear_fc1.weight"
    found = results["EP2"][1][first_of_second_rank]
    wrong = expected[f"{layer}.0.linear_fc1.weight"]
    assert (found - wrong).abs().max() > 1e-2 * wrong.abs().max()
