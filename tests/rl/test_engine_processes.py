"""Several processes of the embedded engine: a run of RL gets the answers that one gives it."""

import asyncio
from argparse import Namespace

import pytest

from megatron_k2.checkpoint.names.mapping import classic_from_transformers
from megatron_k2.engine.protocol import NO_WEIGHTS, Engine, Request, SamplingParams, Token
from megatron_k2.errors import UserError
from megatron_k2.rl import side
from tests.engine.local.models import TINY, reference, tokens

REQUESTS = [
    Request(
        str(i),
        tuple(tokens(20, i // 4)),
        SamplingParams(max_tokens=9, seed=i, returns_routed_experts=True),
    )
    for i in range(8)
]


def _args(number: int) -> Namespace:
    return Namespace(engine_processes=number, bf16=False, seq_length=64, batch_invariant=True)


async def _answered(engine: Engine, request: Request) -> list[Token]:
    return [token async for output in engine.generate(request) for token in output.tokens]


async def _answers(number: int) -> list[list[Token]]:
    engine = side._engine(_args(number), TINY, num_slots=4)
    try:
        assert engine.health().weight_version == NO_WEIGHTS
        assert engine.limits.num_slots == 4
        weights = classic_from_transformers(reference(TINY).state_dict())
        await engine.update_weights(weights.items(), "7")
        return await asyncio.gather(*(_answered(engine, each) for each in REQUESTS))
    finally:
        await engine.close()


@pytest.mark.slow
def test_two_processes_answer_as_one_does() -> None:
    one, two = asyncio.run(_answers(1)), asyncio.run(_answers(2))
    assert one == two
    assert {token.weight_version for tokens in two for token in tokens} == {"7"}


def test_more_processes_than_slots_and_a_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="5 processes for 4 slots"):
        side._engine(_args(5), TINY, num_slots=4)
    monkeypatch.setattr(side, "_has_cuda", lambda: True)
    with pytest.raises(UserError, match="--engine-processes 2: on a CPU alone"):
        side._engine(_args(2), TINY, num_slots=4)
