"""What a push says when something goes wrong on the way, on one rank: never a mixture served."""

import asyncio
import re

import pytest
import torch

from megatron_k2.checkpoint.hf.config import without_yarn
from megatron_k2.engine.local.core import Core
from megatron_k2.engine.local.engine import LocalEngine
from megatron_k2.engine.local.weights import Weights
from megatron_k2.engine.protocol import EngineError, Request, SamplingParams, UpdateCode
from megatron_k2.errors import UserError
from megatron_k2.model.moe import routers
from megatron_k2.weight_sync.push import push
from megatron_k2.weight_sync.source import WeightSource
from tests.support.single_rank import SMALL, build, one_rank, randomise

FC1 = "model.layers.1.mlp.experts.{}.gate_proj.weight"


@pytest.fixture(scope="module")
def model():
    with one_rank():
        model = build(SMALL)
        randomise(model)
        yield model


class Link:
    """An engine behind a transport that does something to the tensors, or to the tag."""

    def __init__(self, engine, change=lambda tensors: tensors, version=None):
        self.engine, self.change, self.version = engine, change, version
        self.health = engine.health

    async def update_weights(self, weights, version, manifest=None):
        await self.engine.update_weights(self.change(weights), self.version or version, manifest)


def dropping(tensors):
    return (named for named in tensors if named[0] != FC1.format(3))


def swapping(tensors):
    names = {FC1.format(1): FC1.format(2), FC1.format(2): FC1.format(1)}
    return ((names.get(name, name), tensor) for name, tensor in tensors)


def stale(tensors):
    """One tensor is still the round before's."""
    return ((n, t - 1e-3 if n == FC1.format(0) else t) for n, t in tensors)


def twice(tensors):
    for name, tensor in tensors:
        yield name, tensor
        if name == FC1.format(0):
            yield name, tensor


def misshapen(tensors):
    return ((n, t[:-1] if n == FC1.format(0) else t) for n, t in tensors)


async def is_refused(engine):
    request = Request("r", (1, 2, 3), SamplingParams(max_tokens=1))
    try:
        async for _ in engine.generate(request):
            pass
    except EngineError:
        return not engine.health().is_ready
    return False


def scenario(model, body, held=torch.float32, sent=torch.float32):
    async def whole():
        weights = Weights(SMALL, held, torch.device("cpu"))
        engine = LocalEngine(Core(weights, num_slots=1, max_length=32))
        source = WeightSource([model], SMALL, dtype=sent, bucket_bytes=9_000)
        try:
            return await asyncio.wait_for(body(source, engine), 60)
        finally:
            await engine.close()

    return asyncio.run(whole())


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (dropping, UpdateCode.WEIGHTS, "1 weights never came"),
        (swapping, UpdateCode.CHECKSUM, "2 of .* are not what was sent"),
        (stale, UpdateCode.CHECKSUM, "1 of .* are not what was sent"),
        (twice, UpdateCode.WEIGHTS, "came twice"),
        (misshapen, UpdateCode.WEIGHTS, "this model's is"),
    ],
)
def test_a_transport_that_loses_or_mixes_up_is_found(model, change, code, said):
    async def body(source, engine):
        before = await push(source, engine, "1")
        found = await push(source, Link(engine, change), "2")
        refused = await is_refused(engine)
        after = await push(source, engine, "3")
        return before, found, refused, after, await is_refused(engine)

    before, found, refused, after, refused_after = scenario(model, body)
    assert (before.code, found.code, after.code) == (UpdateCode.OK, code, UpdateCode.OK)
    assert (refused, refused_after) == (True, False)
    assert re.search(said, found.detail)


def test_an_old_tag_is_found(model):
    async def body(source, engine):
        await push(source, engine, "1")
        found = await push(source, Link(engine, version="1"), "2")
        return found, await is_refused(engine)

    found, refused = scenario(model, body)
    assert (found.code, refused) == (UpdateCode.VERSION, True)
    assert "'1' were announced, what came is tagged '2'" in found.detail


def test_an_update_that_answers_and_transfers_nothing_is_found(model):
    class Deaf(Link):
        async def update_weights(self, weights, version, manifest=None):
            pass

    async def body(source, engine):
        await push(source, engine, "1")
        return await push(source, Deaf(engine), "2")

    found = scenario(model, body)
    assert found.code is UpdateCode.VERSION
    assert "serves '1', not '2'" in found.detail


@pytest.mark.parametrize("place", [0, 1, 40, -1])
def test_a_source_that_stops_leaves_an_engine_that_refuses(model, place):
    async def body(source, engine):
        whole = await push(source, engine, "1")
        last = place % whole.num_tensors

        def stopping(tensors):
            for number, named in enumerate(tensors):
                if number == last:
                    raise ConnectionError("gone")
                yield named

        found = await push(source, Link(engine, stopping), "2")
        return found, await is_refused(engine), (await push(source, engine, "3")).is_whole

    found, refused, is_mended = scenario(model, body)
    assert (found.code, refused, is_mended) == (UpdateCode.SOURCE, True, True)
    assert "gone" in found.detail


def test_answers_after_a_push_are_those_of_the_new_weights(model):
    params = SamplingParams(max_tokens=4, temperature=0, prompt_logprobs=0)

    async def answer(engine):
        outputs = [o async for o in engine.generate(Request("a", (3, 1, 4, 1, 5), params))]
        return [token.logprob for o in outputs for token in o.prompt_tokens + o.tokens]

    async def body(source, engine):
        found = []
        for number in range(2):
            randomise(model, number)
            assert (await push(source, engine, str(number))).is_whole
            fresh_weights = Weights(SMALL, torch.float32, torch.device("cpu"))
            fresh_weights.load(source.tensors())
            fresh = LocalEngine(Core(fresh_weights, num_slots=1, max_length=32))
            found.append((await answer(engine), await answer(fresh)))
            await fresh.close()
        return found

    (first, fresh), (second, fresh_second) = scenario(model, body)
    assert (first, second) == (fresh, fresh_second)
    assert first != second


def test_what_an_engine_holds_narrower_than_sent_cannot_be_vouched_for(model):
    async def body(source, engine):
        return await push(source, engine, "1"), await is_refused(engine)

    found, refused = scenario(model, body, held=torch.bfloat16)
    assert (found.code, refused) == (UpdateCode.CHECKSUM, True)
    assert "send what the engine holds" in found.detail
    found, refused = scenario(model, body, sent=torch.bfloat16)
    assert (found.code, refused) == (UpdateCode.OK, False)


def test_a_model_of_another_shape_is_refused_before_anything_is_sent(model):
    from dataclasses import replace

    async def body(source, engine):
        wrong = WeightSource([model], replace(SMALL, num_layers=4), dtype=torch.float32)
        found = await push(wrong, engine, "1")
        wrong = WeightSource([model], replace(SMALL, ffn_hidden_size=81), dtype=torch.float32)
        return found, await push(wrong, engine, "2")

    missing, misshapen = scenario(model, body)
    assert "no rank holds 'decoder.layers.3." in missing.detail
    assert "the preset expects [162, 48]" in misshapen.detail
    with pytest.raises(UserError, match="buckets of 0 bytes"):
        WeightSource([model], SMALL, bucket_bytes=0)
    with pytest.raises(UserError, match=r"expected torch\.float32 or"):
        WeightSource([model], SMALL, dtype=torch.float16)


@torch.no_grad()
def trainers_own(model, ids):
    """Log-probabilities of ids from the second on, and experts [tokens][layers], by Megatron."""
    maps = []
    hooks = [
        router.register_forward_hook(lambda _router, _given, found: maps.append(found[1]))
        for router in routers([model])
    ]
    tokens = torch.tensor([ids])
    logits = model.eval()(tokens, torch.arange(len(ids))[None], None)
    for hook in hooks:
        hook.remove()
    scores = logits.float().log_softmax(-1)[0, :-1].gather(1, tokens[0, 1:, None])[:, 0]
    routes = [
        [frozenset(row.nonzero()[:, 0].tolist()) for row in each.view(len(ids), -1)]
        for each in maps
    ]
    return scores, list(zip(*routes, strict=True))


def test_the_engine_scores_and_routes_as_the_trainer_does(model):
    """What a ratio of an update and a replay of routes rest on, prompt and answer."""
    shape = without_yarn(SMALL)  # as ``build`` makes it
    params = SamplingParams(max_tokens=20, prompt_logprobs=0, returns_routed_experts=True, seed=3)

    async def whole():
        weights = Weights(shape, torch.float32, torch.device("cpu"))
        engine = LocalEngine(Core(weights, num_slots=1, max_length=64))
        source = WeightSource([model], shape, dtype=torch.float32)
        assert (await push(source, engine, "1")).is_whole
        request = Request("a", tuple(range(40, 60)), params)
        outputs = [output async for output in engine.generate(request)]
        await engine.close()
        return [token for o in outputs for token in (*o.prompt_tokens, *o.tokens)]

    randomise(model, 5)
    found = asyncio.run(whole())
    scores, routes = trainers_own(model, [token.id for token in found])
    ours = torch.tensor([token.logprob for token in found[1:]])
    assert (ours - scores).abs().max() < 1e-5 * scores.abs().max()
    assert found[-1].routed_experts is None  # never an input
    sent = [tuple(map(frozenset, t.routed_experts.array[0].tolist())) for t in found[:-1]]
    assert sent == routes[:-1]
    randomise(model, 6)  # the wrong variant: the trainer has moved on
    moved, other = trainers_own(model, [token.id for token in found])
    assert (ours - moved).abs().max() > 0.1
    assert other != routes


def test_an_engine_that_draws_nothing_leaves_no_rank_waiting(model, monkeypatch):
    """Other ranks wait for the root's first word even where its engine has gone before that."""

    class Gone(Link):
        async def update_weights(self, weights, version, manifest=None):
            raise EngineError("nobody listens there")

    gathered = []
    original = torch.distributed.all_gather_object
    monkeypatch.setattr(
        torch.distributed,
        "all_gather_object",
        lambda *args, **more: (gathered.append(1), original(*args, **more)),
    )

    async def body(source, engine):
        return await push(source, Gone(engine), "1")

    found = scenario(model, body)
    assert (found.code, found.detail) == (UpdateCode.ENGINE, "nobody listens there")
    assert gathered == [1]
