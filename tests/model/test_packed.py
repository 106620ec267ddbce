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
NO_BALANCE = "--moe-router-load-balancing-type none --moe-aux-loss-coeff 0".split()
"""Whose loss counts rows, so that a prompt's would count as often as it is computed."""


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


def test_documents_that_go_on_from_another_by_hand():
    layout = lay_out([3, 2, 1, 2], 10, beginnings=[-1, 0, 0, -1])
    assert layout.positions().tolist() == [0, 1, 2, 3, 4, 3, 0, 1, -1, -1]
    assert layout.key_spans() == [(0, 3), (0, 3), (3, 5), (0, 3), (5, 6), (6, 8), (8, 10)]
    assert layout.longest == 5
    assert lay_out([3, 2], 8, beginnings=[-1, -1]) == lay_out([3, 2], 8)
    assert describe(lay_out([3, 2], 8), np.arange(8), "cpu").positions is None


@pytest.mark.parametrize(
    ("beginnings", "multiple"), [([-1, 1, -1], 1), ([-1, 0, -1], 4), ([-1, 0], 1), ([-1, 0, 1], 1)]
)
def test_a_beginning_is_an_earlier_document_that_stands_alone(beginnings, multiple):
    with pytest.raises(ValueError, match=r"expected earlier documents that stand alone"):
        lay_out([4] * 3, 16, multiple, beginnings)


@pytest.fixture(scope="module")
def model():
    with one_rank():
        model = build(SMALL, "--sft-data", "memory", "--sft-loss", "token", *NO_BALANCE).train()
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


PROMPT, ENDS = 9, (4, 7, 1)


def _ids(number):
    """Token ids of a prompt (-1) or of what follows it."""
    generator = torch.Generator().manual_seed(17 + number)
    return torch.randint(50, ((PROMPT, *ENDS)[number + 1],), generator=generator)


def _learnt(model, layout, ids, rows):
    """Hidden states of the rows that are asked for, gradients of a sum over them, S_max."""
    ids = torch.cat([*ids, torch.zeros(layout.num_rows - sum(map(len, ids)), dtype=torch.long)])
    packed = describe(layout, layout.rows_of_rank(1, 0), "cpu")
    positions = torch.from_numpy(layout.positions())[None]
    maxima = [
        layer.self_attention.core_attention.current_max_attn_logits for layer in layers(model)
    ]
    for each in maxima:
        each.fill_(-torch.inf)
    model.zero_grad()
    logits = model(ids[None], positions, None, packed_seq_params=packed)[0, rows]
    logits.log_softmax(-1)[torch.arange(len(rows)), torch.arange(len(rows)) % 50].sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    _loads(model)
    return logits.detach(), gradients, torch.stack(maxima).clone()


def layers(model):
    return model.decoder.layers


def test_a_prompt_that_documents_go_on_from_is_one_before_each_of_them(model):
    """Logits, gradients and S_max. Wrong variant: documents that do not see where they began."""
    prompt, ends = _ids(-1), [_ids(number) for number in range(len(ENDS))]
    whole = [torch.cat([prompt, end]) for end in ends]
    apart = lay_out([len(each) for each in whole], 48)
    rows = [
        row
        for start, each in zip(apart.bounds, whole, strict=False)
        for row in range(start + PROMPT, start + len(each))
    ]
    expected = _learnt(model, apart, whole, rows)
    lengths, beginnings = [PROMPT, *ENDS], [-1, 0, 0, 0]
    rows = list(range(PROMPT, PROMPT + sum(ENDS)))
    for found, is_same in (
        (_learnt(model, lay_out(lengths, 24, 1, beginnings), [prompt, *ends], rows), True),
        (_learnt(model, lay_out(lengths, 24), [prompt, *ends], rows), False),
    ):
        assert torch.allclose(found[0], expected[0], atol=1e-5) is is_same
        assert torch.allclose(found[2], expected[2], rtol=1e-5) is is_same
        worst = max(float((found[1][n] - grad).abs().max()) for n, grad in expected[1].items())
        largest = max(float(grad.abs().max()) for grad in expected[1].values())
        assert (worst < 1e-5 * largest) is is_same
