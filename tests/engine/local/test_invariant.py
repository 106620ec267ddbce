"""Batch-invariant mode: the same bits of every token, whatever else is computed and how.

The oracle is a request alone: one slot, its prompt in one chunk, nobody to share with. Numbers are
compared for equality. Wrong variants: the default mode, and products whose tiles are as many rows
as there happen to be.
"""

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megatron_k2.engine.local import tiles
from megatron_k2.engine.local.core import Core
from megatron_k2.engine.protocol import Request, SamplingParams
from megatron_k2.errors import UserError
from tests.engine.local.models import TINY, reference, tokens, weights_of
from tests.engine.local.test_core import drain, run, same_or_near_tie
from tests.support.devices import DEVICES, on_device

LENGTH = 224
"""Two tiles of cached tokens."""
STYLES = (
    SamplingParams(temperature=0, max_tokens=9, logprobs=3),
    SamplingParams(max_tokens=12, seed=5),
    SamplingParams(max_tokens=7, seed=6, temperature=1.4, top_p=0.8, repetition_penalty=1.2),
    SamplingParams(max_tokens=5, seed=7, top_k=5, min_p=0.01, prompt_logprobs=1),
)
BEGINNING = tuple(tokens(140, 99))
SIZES = (1, 3, 17, 40, 64, 127, 129, 150)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def weights(request):
    return weights_of(reference(TINY), TINY, request.param)


def core_of(weights, num_slots, *, is_batch_invariant=True, **options):
    return Core(
        weights, num_slots=num_slots, max_length=LENGTH,
        is_batch_invariant=is_batch_invariant, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def crowd():
    """Prompts of many lengths, some of which begin alike, in four styles."""
    drawn = [tuple(tokens(size, seed)) for seed, size in enumerate(SIZES)]
    drawn += [BEGINNING + tuple(tokens(3 + i, 50 + i)) for i in range(4)]
    return [Request(str(i), prompt, STYLES[i % len(STYLES)]) for i, prompt in enumerate(drawn)]


def alone(weights, requests, **options):
    found = {}
    for request in requests:
        answers, _, prompts = run(core_of(weights, 1, **options), [request])
        found[request.id] = prompts[request.id] + answers[request.id]
    return found


@pytest.fixture(scope="module")
def expected(weights, crowd):
    return alone(weights, crowd)


def arriving(core, requests, seed):
    """Answers where requests come in some order, a few between two steps."""
    order = random.Random(seed)
    left, found = order.sample(requests, len(requests)), {r.id: [] for r in requests}
    while left or core.has_work:
        for _ in range(order.randrange(3)):
            if left:
                core.add(left.pop())
        for name, output in core.step():
            found[name] += [*output.prompt_tokens, *output.tokens]
    return found


@pytest.mark.parametrize("shares_prefixes", [True, False])
@pytest.mark.parametrize(("num_slots", "step_tokens"), [(12, 1024), (5, 24), (3, 7)])
def test_a_request_has_its_bits_in_every_crowd(
    weights, crowd, expected, num_slots, step_tokens, shares_prefixes
):
    core = core_of(weights, num_slots, step_tokens=step_tokens, shares_prefixes=shares_prefixes)
    assert arriving(core, crowd, seed=num_slots) == expected


def test_the_default_mode_is_found(weights, crowd):
    options = {"is_batch_invariant": False}
    core = core_of(weights, 12, **options)
    assert arriving(core, crowd, seed=12) != alone(weights, crowd, **options)


def test_tiles_as_large_as_what_there_is_are_found(crowd, monkeypatch):
    weights = weights_of(reference(TINY), TINY)
    monkeypatch.setattr(tiles, "_sizes_of", lambda *_: tuple(range(1, 257)))
    core = core_of(weights, 12)
    assert arriving(core, crowd, seed=12) != alone(weights, crowd)


@pytest.mark.parametrize("num_done", [1, 6, 11])
@pytest.mark.parametrize("style", [STYLES[1], replace(STYLES[0], max_tokens=12)])
def test_an_answer_that_is_continued_is_the_one_that_was_not_cut(weights, crowd, style, num_done):
    """Its beginning comes back as a prompt: read, where it had been decoded."""
    whole = Request("whole", tuple(tokens(123, 4)), style)
    undisturbed = alone(weights, [whole])["whole"]
    ids = tuple(t.id for t in undisturbed[:num_done])
    rest = Request("rest", whole.prompt + ids, replace(style, max_tokens=12 - num_done))
    core = core_of(weights, 4, step_tokens=20)
    assert arriving(core, [rest, *crowd[:5]], seed=1)["rest"] == undisturbed[num_done:]


def test_answers_are_the_models(crowd):
    model = reference(TINY)
    requests = [replace(r, params=STYLES[0]) for r in crowd]
    found, _, _ = run(core_of(weights_of(model, TINY), 6, step_tokens=50), requests)
    for request in requests:
        same_or_near_tie(model, list(request.prompt), found[request.id])


@pytest.mark.parametrize("device", DEVICES)
def test_new_weights_keep_it(device):
    from megatron_k2.checkpoint.names.mapping import classic_from_transformers

    named = classic_from_transformers(reference(TINY, seed=1).state_dict())
    requests = [Request(str(i), tuple(tokens(20 + i, i)), STYLES[1]) for i in range(5)]
    with on_device(device):
        core = core_of(weights_of(reference(TINY), TINY, device=device), 5)
        run(core, requests)
        core.update(named.items(), "0")
        together, _, _ = run(core, requests)
        new = weights_of(reference(TINY, seed=1), TINY, device=device)
        assert together == alone(new, requests)


def test_a_sum_is_a_tree_that_zeros_do_not_change():
    x = torch.randn(5, 77)
    assert torch.allclose(tiles.total(x), x.sum(-1, keepdim=True), atol=1e-5)
    assert torch.equal(tiles.total(F.pad(x, (0, 200))), tiles.total(x))
    assert torch.equal(tiles.total(x)[3:4], tiles.total(x[3:4]))


@pytest.mark.parametrize("function", [F.silu, torch.sigmoid, torch.exp])
def test_an_element_keeps_its_bits_at_every_place(function):
    x = torch.randn(70_001)
    whole = tiles.elementwise(function, x)
    assert torch.equal(tiles.elementwise(function, x[65_000:]), whole[65_000:])
    assert torch.equal(torch.cat([tiles.elementwise(function, p) for p in x.split(997)]), whole)


def test_a_machine_whose_rows_hang_on_their_place_is_refused(monkeypatch):
    weights, linear = weights_of(reference(TINY), TINY), F.linear

    def crooked(x, weight):
        out = linear(x, weight)
        out[0] *= 1 + 1e-6
        return out

    monkeypatch.setattr(F, "linear", crooked)
    with pytest.raises(UserError, match="no batch-invariant mode"):
        core_of(weights, 1)


def test_where_pairs_have_other_bits_they_go_one_by_one(crowd, monkeypatch):
    weights = weights_of(reference(TINY), TINY)
    monkeypatch.setattr(tiles.Products, "_sizes_of_pairs", lambda *_: ())
    core = core_of(weights, 12)
    assert arriving(core, crowd[:4], seed=1) == alone(weights, crowd[:4])
    assert drain(core) == ({}, {}, {})
