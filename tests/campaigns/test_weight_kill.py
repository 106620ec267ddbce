"""The campaign's short form, and that it sees a mixture."""

import asyncio

import pytest

from megatron_k2.engine.transfer.manifest import Counted
from tests.campaigns import weight_kill
from tests.weight_sync.far_side import new_engine, tensors_of


@pytest.mark.dist
def test_no_mixture_is_served_after_a_kill(capsys):
    assert weight_kill.main(["--only", "0", "7", str(weight_kill.num_messages() - 1)]) == 0
    assert "'refused': 1" in capsys.readouterr().out


def test_a_mixture_would_be_seen():
    engine, weights = new_engine()

    async def body():
        counted = Counted(tensors_of("new").items(), "new")
        await engine.update_weights(counted, "new", counted.manifest)
        served = await weight_kill.held_by(engine, weights)
        name = "model.layers.1.mlp.experts.2.down_proj.weight"
        weights.held[name].copy_(tensors_of("old")[name])
        mixed = await weight_kill.held_by(engine, weights)
        await engine.close()
        return served, mixed

    assert asyncio.run(body()) == ("new", "mixture")
    assert weight_kill.is_right("sender", "refused")
    assert not weight_kill.is_right("sender", "mixture")
