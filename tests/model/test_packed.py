"""Layout of packs, attention over them with padding, and padding kept out of a router's loads."""

import itertools

import numpy as np
import pytest
import torch

from megatron_k2.model.packed import describe, lay_out, next_in_document
from megatron_k2.sft.sets import row_multiple
from tests.model.test_attention import _core, _sbhd
from tests.support.single_rank import SMALL, build, one_rank, randomise

LENGTHS = [5, 12, 1, 3]


@pytest.mark.parametrize("cp_size", [1, 2, 3])
def test_ranks_share_out_the_rows_and_each_has_the_zigzag_of_every_document(cp_size):
    layout = lay_out(LENGTHS, 48, row_multiple(cp_size))
    rows = [layout.rows_of_rank(cp_size, rank) for rank in range(cp_size)]
    assert sorted(np.concatenate(rows)) == list(range(48))
    for rank, (start, end) in itertools.product(range(cp_size), itertools.pairwise(layout.bounds)):
        here = [row - start for row in rows[rank] if start <= row < end]
        chunks = np.split(np.arange(end - start), max(1, 2 * cp_size * (cp_size > 1)))
        wanted = [chunks[0]] if cp_size == 1 else [chunks[rank], chunks[2 * cp_size - 1 - rank]]
        assert here == np.concatenate(wanted).tolist()


def test_what_does_not_fit_or_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="28 rows in multiples of 4, the pack has 24"):
        lay_out(LENGTHS, 24, 4)
    with pytest.raises(ValueError, match="multiples of 4"):
        lay_out(LENGTHS, 30, 4)


def test_successors_stop_at_a_documents_last_token_and_leave_padding():
    layout = lay_out([3, 2], 8, 4)
    packed = describe(layout, layout.rows_of_rank(1, 0), "cpu")
    values = torch.tensor([[11, 12, 13, -1, 21, 22, -1, -2]])
    found = next_in_document(values, packed)
    assert found.tolist() == [[12, 13, 0, -1, 22, 0, -1, -2]]
    assert values[0, 0] == 11, "the input is left as it was"


def test_padding_is_in_no_maximum_and_comes_out_as_zero_whatever_it_holds():
    layout = lay_out(LENGTHS, 32, 4)
    positions = torch.from_numpy(layout.positions())
    q, k, v = (t[:, 0].clone() for t in _sbhd(s=32, b=1))
    for tensor in (q, k):
        tensor[positions < 0] = 40.0  # logits far above any token's
    packed = describe(layout, layout.rows_of_rank(1, 0), "cpu")
    core, counting = _core().train(), _core().train()
    out = core(q, k, v, packed_seq_params=packed)
    assert not out[positions < 0].any()
    packed.layout = lay_out(np.diff(layout.bounds).tolist(), 32)
    counted = counting(q, k, v, packed_seq_params=packed)
    assert torch.equal(counted[positions >= 0], out[positions >= 0])
    assert (counting.current_max_attn_logits > 10 * core.current_max_attn_logits).all()


@pytest.fixture(scope="module")
def model():
    with one_rank():
        model = build(SMALL, "--sft-data", "memory", "--sft-loss", "token").train()
        randomise(model)
        yield model


def _run(model, positions, packed=None, **kwargs):
    ids = torch.arange(positions.shape[1])[None] % 50
    return model(ids, positions, None, packed_seq_params=packed, **kwargs)


def _loads(model):
    from megatron_k2.model.moe import routers

    found = [router.local_tokens_per_expert.clone() for router in routers([model])]
    for router in routers([model]):
        router.local_tokens_per_expert.zero_()
    return found


def test_padding_rows_are_zero_behind_every_layer_and_in_no_load(model):
    layout = lay_out(LENGTHS, 32, 4)
    positions = torch.from_numpy(layout.positions())[None]
    packed = describe(layout, layout.rows_of_rank(1, 0), "cpu")
    seen = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: seen.append(out[0].detach()))
        for layer in model.decoder.layers
    ]
    try:
        _run(model, positions, packed)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(seen) == SMALL.num_layers
    for hidden in seen:
        assert not hidden[positions[0] < 0].any()
        assert hidden[positions[0] >= 0].any(-1).all(), "and no token's row is"
    tokens = sum(LENGTHS) * SMALL.moe_router_topk
    assert [int(load.sum()) for load in _loads(model)] == [tokens] * (SMALL.num_layers - 1)


def test_without_padding_nothing_is_taken_from_the_loads(model):
    _run(model, torch.arange(32)[None])
    assert all(int(load.sum()) == 32 * SMALL.moe_router_topk for load in _loads(model))


def test_upstreams_own_padding_mask_does_not_reach_the_loads(model):
    """It is applied along the experts. Once this passes upstream, zero rows have a twin there."""
    with pytest.raises(RuntimeError, match="must match the size"):
        _run(model, torch.arange(32)[None], padding_mask=torch.zeros(1, 32, dtype=torch.bool))
    _loads(model)
