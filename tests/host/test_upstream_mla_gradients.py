"""Upstream's stock local MLA at TP2: wrong gradients of exactly the shared rotary key's rows.

Why ``model/mla.py:K2SelfAttention`` exists. Megatron-Core 0.19.2 shards the down-projection by
column and gathers its output; the gather's backward pass only splits, and each rank uses the shared
rotary key for its own heads alone. Correct gradients agree to fp32 rounding, 2e-6.
"""

import pytest

from tests.model.worker import MLA, results_of

pytestmark = [pytest.mark.dist, pytest.mark.slow]

KV_DOWN = "linear_kv_down_proj.weight"
FIXED = (
    "upstream's MLA now has correct gradients at TP2: K2SelfAttention can go "
    "(keep its latent norm epsilon)"
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    cases = ["upstream one rank", "upstream TP2", "upstream TP2+SP"]
    return results_of(cases, tmp_path_factory.mktemp("upstream"))


@pytest.mark.parametrize("layout", ["upstream TP2", "upstream TP2+SP"])
def test_upstream_gets_the_rotary_rows_wrong_and_no_other_weight(results, layout):
    expected, found = results["upstream one rank"][0], results[layout][0]
    rows = (found[KV_DOWN] - expected[KV_DOWN]).abs().amax(1) / expected[KV_DOWN].abs().max()
    rope = MLA["qk_pos_emb_head_dim"]
    assert rows[:-rope].max() < 2e-6
    assert rows[-rope:].min() > 1e-3, FIXED
    others = {
        name: ((found[name] - whole).abs().max() / whole.abs().max()).item()
        for name, whole in expected.items()
        if name not in (KV_DOWN, "input")
    }
    assert max(others.values()) < 2e-6, others


def test_the_error_reaches_the_hidden_states_before_it(results):
    expected, found = (results[name][0]["input"] for name in ("upstream one rank", "upstream TP2"))
    assert (found - expected).abs().max() / expected.abs().max() > 1e-3, FIXED
