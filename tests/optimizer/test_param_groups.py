"""Which parameters are Muon's, and that cutting and joining shards are inverse."""

from dataclasses import replace

import pytest
import torch

from megatron_k2.optimizer.param_groups import MatrixSpec, muon_matrices
from tests.single_rank import SMALL, build, one_rank


@pytest.fixture(scope="module", autouse=True)
def _rank():
    with one_rank():
        yield


def _by_name(model):
    known = muon_matrices([model])
    return {name: known.get(param) for name, param in model.named_parameters()}


MATRICES_OF_A_LAYER = {
    "self_attention.linear_q_down_proj": 1,
    "self_attention.linear_q_up_proj": 1,
    "self_attention.linear_kv_down_proj": 1,
    "self_attention.linear_kv_up_proj": 1,
    "self_attention.linear_proj": 1,
    "mlp.router": 1,
    "mlp.shared_experts.linear_fc1": 2,
    "mlp.shared_experts.linear_fc2": 1,
} | {
    f"mlp.experts.local_experts.{expert}.linear_fc{i}": blocks
    for expert in range(SMALL.num_moe_experts)
    for i, blocks in ((1, 2), (2, 1))
}


def test_every_matrix_of_a_layer_with_experts_is_muons_and_nothing_else_is():
    found = {
        name.removeprefix("decoder.layers.1.").removesuffix(".weight"): spec.num_blocks
        for name, spec in _by_name(build(SMALL)).items()
        if spec is not None and name.startswith("decoder.layers.1.")
    }
    assert found == MATRICES_OF_A_LAYER


@pytest.mark.parametrize("preset", [SMALL, replace(SMALL, q_lora_rank=None)], ids=["k2", "no q"])
def test_embedding_head_and_vectors_are_adams_and_every_other_parameter_is_muons(preset):
    specs = _by_name(build(preset))
    adams = {name for name, spec in specs.items() if spec is None}
    assert {name for name in adams if "norm" not in name} == {
        "embedding.word_embeddings.weight",
        "output_layer.weight",
    }
    model = build(preset)
    assert all(p.ndim == 1 for name, p in model.named_parameters() if "norm" in name)
    assert not any("norm" in name for name in specs.keys() - adams)


def test_experts_are_marked_and_nothing_else_is():
    specs = {name: spec for name, spec in _by_name(build(SMALL)).items() if spec}
    assert {name for name, spec in specs.items() if spec.is_expert} == {
        name for name in specs if "local_experts" in name
    }


def test_a_matrix_in_an_unknown_module_is_an_error_that_names_it():
    model = build(SMALL)
    model.decoder.layers[1].surprise = torch.nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"layers\.1\.surprise: a \(3, 4\) matrix in Linear"):
        muon_matrices([model])


LAYOUTS = [(blocks, dim) for blocks in (1, 2) for dim in (-1, 0, 1)]


def _megatron_shards(gate_up, num_blocks, dim, size):
    """What rank r holds: its part of every block, blocks stacked along the rows."""
    if dim < 0:
        return [torch.cat(gate_up)]
    return [torch.cat([block.chunk(size, dim)[r] for block in gate_up]) for r in range(size)]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("num_blocks", "dim"), LAYOUTS)
def test_shards_join_to_the_whole_matrices_and_are_cut_back(num_blocks, dim, size):
    if dim < 0:
        size = 1
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(8, 12, generator=generator) for _ in range(num_blocks)]
    shards = _megatron_shards(whole, num_blocks, dim, size)
    spec = MatrixSpec(num_blocks, dim, is_expert=False)
    joined = spec.assemble(shards)
    assert len(joined) == num_blocks
    assert all(torch.equal(a, b) for a, b in zip(joined, whole, strict=True))
    for rank, shard in enumerate(shards):
        assert torch.equal(spec.own_part(joined, rank, size), shard)


def test_shards_joined_as_if_not_fused_are_other_matrices():
    whole = [torch.full((4, 3), 1.0), torch.full((4, 3), 2.0)]
    shards = _megatron_shards(whole, 2, 0, 2)
    (wrong,) = MatrixSpec(1, 0, is_expert=False).assemble(shards)
    assert not torch.equal(wrong, torch.cat(whole))


@pytest.mark.parametrize("rank", range(3))
def test_a_replicated_matrix_is_whole_on_every_rank(rank):
    matrix = torch.randn(4, 3)
    spec = MatrixSpec(1, -1, is_expert=False)
    assert torch.equal(spec.own_part(spec.assemble([matrix]), rank, 3), matrix)
