"""Elements and bytes of each rank against the list of a rank's weights, and against the report."""

import itertools

import pytest

from megatron_k2.planning.cost.activations import attention_rows, kept_bytes, layer_bytes, mlp_rows
from megatron_k2.planning.cost.memory import optimizer_bytes, rank_memory, rank_parameters
from megatron_k2.planning.cost.params import count_parameters
from megatron_k2.planning.cost.shapes import rank_weights
from megatron_k2.planning.gpus import get_gpu
from megatron_k2.planning.request import RunRequest
from megatron_k2.presets import get_preset

K2 = get_preset("kimi-k2")


def request(preset="kimi-k2", world=256, **changes):
    run = {"seq_length": 4096, "sequences_per_step": 16384, "pp": 16, "ep": 16} | changes
    return RunRequest(preset=get_preset(preset), gpu=get_gpu("h800"), world_size=world, **run)


@pytest.mark.parametrize(
    ("preset", "layout"),
    [
        ("kimi-k2", {"pp": 16, "vpp": 2, "ep": 16}),
        ("kimi-k2", {"pp": 8, "ep": 32}),
        ("kimi-k2", {"pp": 4, "tp": 2, "ep": 64}),
        ("moonlight-16b-a3b", {"pp": 4, "vpp": 2, "ep": 8}),
        ("k2-tiny", {"pp": 1, "ep": 1}),
    ],
)
def test_elements_of_every_rank_are_those_of_its_list_of_weights(preset, layout):
    r = request(preset, **layout)
    for rank in range(r.pp):
        dense = expert = 0
        for chunk in (c for c in r.chunks() if c.rank == rank):
            ends = {"has_embedding": chunk.has_embedding, "has_head": chunk.has_head}
            for weight in rank_weights(r.preset, chunk.layers, tp=r.tp, ep=r.ep, **ends):
                numel = 1
                for size in weight.shape:
                    numel *= size
                expert += numel * weight.is_expert
                dense += numel * (not weight.is_expert)
        found = rank_parameters(r, rank)
        assert (found.dense_muon + found.adamw, found.expert_muon) == (dense, expert)


def test_all_ranks_together_hold_the_model_once():
    r = request()
    held = [rank_parameters(r, rank) for rank in range(16)]
    total = sum(p.dense_muon + p.adamw + 16 * p.expert_muon for p in held)
    assert total == count_parameters(K2).trainable == 1_026_408_209_408


def test_optimizer_states_of_all_ranks_are_the_models_exactly():
    for world in (256, 1024):
        r = request(world=world)
        ranks = world // 16  # of one pipeline rank; each has its own shard
        total = sum(optimizer_bytes(r, rank_parameters(r, rank)) for rank in range(16)) * ranks
        adamw = sum(rank_parameters(r, rank).adamw for rank in range(16))
        assert total == 8 * (1_026_408_209_408 - adamw) + 12 * adamw


def test_the_report_on_256_gpus():
    """Section 2.4.2: parameters and gradients about 6 TB; about 30 GB a GPU for all states."""
    r = request(vpp=2)
    memory = [rank_memory(r, rank) for rank in range(16)]
    bytes_once = 6 * count_parameters(K2).trainable
    assert 5.9e12 < bytes_once < 6.3e12
    assert bytes_once / 256 == pytest.approx(24e9, rel=0.01)
    mean = sum(m.states for m in memory) / 16
    optimizer = sum(m.optimizer for m in memory) / 16
    # 30 GB for all states is met by the mean rank once most optimizer states are on the host.
    offloaded = (mean - 30e9) / optimizer
    assert 0.75 < offloaded < 0.95
    fewer = request(world=2048, vpp=2)
    assert max(rank_memory(fewer, rank).optimizer for rank in range(16)) < 5e9


def test_recompute_and_fp8_drop_what_they_name():
    none: frozenset = frozenset()
    plain = layer_bytes(K2, 1, is_moe=True)
    all_of_it = layer_bytes(K2, 1, is_moe=True, recompute=frozenset({"norm", "swiglu", "mla_up"}))
    rows = [*attention_rows(K2, 1), *mlp_rows(K2, 1, is_moe=True)]
    assert plain == sum(row.bytes_per_token for row in rows)
    assert plain - all_of_it == sum(row.bytes_per_token for row in rows if row.recompute)
    # [tokens, 7168] x 8 copies and the SwiGLU inputs, 2 bytes -> 1 + 4/128
    eight = 8 * (7168 + 2 * 2048) + 2 * 2048
    saved = plain - layer_bytes(K2, 1, is_moe=True, fp8_storage=True)
    assert saved == pytest.approx(eight * (2 - 1 - 4 / 128))
    assert kept_bytes(iter(rows), none, fp8_storage=False) == plain


def test_activations_fall_from_the_first_rank_to_the_last():
    r = request(vpp=1, pp=16)
    per_layer = [
        rank_memory(r, rank).activations / 4 for rank in range(1, 14)
    ]  # ranks of four layers each
    assert all(a > b for a, b in itertools.pairwise(per_layer))
