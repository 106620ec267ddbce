"""Phases of K2 against the sums by hand; what does not fit is refused with its arithmetic."""

from dataclasses import replace

import pytest

from megatron_k2.errors import UserError
from megatron_k2.planning.cost.memory import rank_memory
from megatron_k2.planning.rl.fit import fewest_nodes, plan_memory, slots_that_fit
from megatron_k2.planning.rl.memory import (
    ENGINE_RESIDUE_GB,
    ENGINE_WORKSPACE_GB,
    TRAINER_RESIDUE_GB,
    engine_weights,
    held,
    latent_bytes,
)
from megatron_k2.planning.rl.request import EngineLayout
from megatron_k2.planning.update import model_bytes
from megatron_k2.presets import KIMI_K2, MOONLIGHT_16B_A3B
from tests.planning.rl.asked import LENGTHS, request

GB = 1e9


@pytest.mark.parametrize(("p", "is_fp8"), [(KIMI_K2, True), (MOONLIGHT_16B_A3B, False)])
def test_one_gpu_would_hold_the_model(p, is_fp8):
    alone = EngineLayout(1, 1, gpus_per_node=1, is_fp8=is_fp8, slots=1)
    biases = 4 * p.num_moe_layers * p.num_moe_experts
    assert engine_weights(p, alone).total == pytest.approx(model_bytes(p, is_fp8=is_fp8) - biases)


def test_k2_does_not_fit_a_node_nor_two_of_80_gb():
    """8 x 80 GB are 640 GB, the weights 1,029 GB; two nodes hold them and nothing else."""
    assert 1028 * GB < model_bytes(KIMI_K2, is_fp8=True) < 1030 * GB
    for nodes, share in ((1, 1029 / 8), (2, 1029 / 16)):
        weights = engine_weights(KIMI_K2, EngineLayout(1, nodes, tp=8, slots=8)).total
        assert share * GB < weights < (share + 3) * GB, "what is not split counts eight times"
        with pytest.raises(UserError, match=r"phase update: .*engine weights .*residue 8\.5"):
            plan_memory(request("h800", nodes, tp=8))
    plan_memory(request("h800", 4))


def test_a_node_of_141_gb_is_too_small_for_both_and_two_are_not():
    with pytest.raises(UserError, match=r"on a GPU of 141 .*nodes_per_replica=2"):
        plan_memory(request("h200", 1, tp=8))
    plan_memory(request("h200", 2))


@pytest.mark.parametrize(("gpu", "nodes"), [("h800", 4), ("h200", 2)])
def test_the_fewest_nodes_are_found(gpu, nodes):
    engines = fewest_nodes(request(gpu, 1), 2048)
    assert (engines.nodes_per_replica, engines.replicas) == (nodes, 32 // nodes)
    assert engines.slots * engines.replicas == 2048
    with pytest.raises(UserError, match="on a GPU of 80"):
        fewest_nodes(request("h800", 1, engines=EngineLayout(2, 1, is_colocated=False)), 32)


def test_phases_add_up_by_hand():
    r = request("h800", 4)
    found = held(r)
    state = max((rank_memory(r.trainer, rank, 0) for rank in range(8)), key=lambda m: m.total)
    weights = engine_weights(KIMI_K2, r.engines).total
    assert found.train.total == pytest.approx(
        state.states + state.activations + (TRAINER_RESIDUE_GB + ENGINE_RESIDUE_GB) * GB
    )
    beside = (ENGINE_WORKSPACE_GB + TRAINER_RESIDUE_GB) * GB
    assert found.update.total == pytest.approx(state.weights + weights + beside + 2**29)
    assert found.rollout.total == pytest.approx(80 * GB), "the cache is what is left"
    assert found.rollout.cache == pytest.approx(80 * GB - weights - beside)
    assert found.rollout.on_host == pytest.approx(state.weights + state.optimizer)
    assert found.train.on_host == pytest.approx(state.activations_on_host)


def test_a_latent_is_512_and_64_elements_a_layer():
    assert latent_bytes(KIMI_K2) == 61 * 576 * 2
    r = request("h800", 4)
    tokens = held(r).cache_tokens
    assert tokens == int(held(r).rollout.cache / 70_272)
    assert slots_that_fit(r, tokens) == 32 * int(tokens / LENGTHS.held)


def test_more_answers_than_the_cache_holds_are_refused_with_those_that_fit():
    r = request("h800", 4, slots=4096)
    most = slots_that_fit(r, held(r).cache_tokens)
    with pytest.raises(UserError, match=f"take engines.slots={most} or fewer"):
        plan_memory(r)
    plan_memory(request("h800", 4, slots=most))


def test_an_answer_longer_than_the_cache_is_refused():
    with pytest.raises(UserError, match=r"cache has 278,118 tokens .* one answer may have 401,024"):
        plan_memory(request("h800", 4, lengths=replace(LENGTHS, most=400_000)))


def test_states_that_the_host_has_no_room_for_are_refused(monkeypatch):
    monkeypatch.setattr("megatron_k2.planning.rl.fit.HOST_GB_PER_GPU", 40)
    with pytest.raises(UserError, match=r"phase rollout: 43 GB of host memory .* 320 GB for 8"):
        plan_memory(request("h800", 4))


def test_without_the_residue_two_nodes_would_seem_to_fit(monkeypatch):
    """What the assumption decides: 16 GPUs of 80 GB hold weights and cache of an engine alone."""
    monkeypatch.setattr("megatron_k2.planning.rl.memory.TRAINER_RESIDUE_GB", 0.0)
    found = held(request("h800", 2, tp=8))
    assert found.cache_tokens > 32768


def test_engines_on_nodes_of_their_own_have_the_whole_gpu():
    r = request("h800", 4)
    own = request("h800", 4, engines=r.engines.replace(is_colocated=False))
    assert own.world_size == 512
    more = held(own).rollout.cache - held(r).rollout.cache
    assert more == pytest.approx(TRAINER_RESIDUE_GB * GB)
    assert held(own).rollout.on_host == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: EngineLayout(1, 1, tp=3), "does not divide the 8 GPUs"),
        (lambda: EngineLayout(1, 2, slots=24), "a multiple of the 16 groups"),
        (lambda: EngineLayout(0, 1), "1 or more of each"),
        (lambda: EngineLayout(1, 1, backend="trt"), "local, vllm, sglang"),
        (lambda: request(engines=EngineLayout(3, 4)), "3 replicas of 32 GPUs on the trainer's 256"),
        (lambda: request(judged=2), "a part from 0 to 1"),
        (lambda: engine_weights(KIMI_K2, EngineLayout(1, 5, slots=40)), "384 experts on a replica"),
    ],
)
def test_engines_that_cannot_be_are_refused(call, words):
    with pytest.raises(UserError, match=words):
        call()
