"""Which parameters are Muon's, how many matrices each holds, and the table that says so."""

from dataclasses import replace

import pytest
import torch

from megatron_k2.optimizer.classification import classification_table
from megatron_k2.optimizer.muon import muon_step
from megatron_k2.optimizer.param_groups import MatrixOptions, MatrixSpec, muon_matrices
from megatron_k2.optimizer.settings import settings_from
from megatron_k2.optimizer.sharded.matrix_group import MatrixGroup, MatrixParameter
from tests.support.single_rank import SMALL, arguments, build, one_rank


@pytest.fixture(scope="module", autouse=True)
def _rank():
    with one_rank():
        yield


def _by_name(model, **options):
    known = muon_matrices([model], MatrixOptions(**options))
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


def test_per_head_splits_the_up_projections_of_mla_and_nothing_else():
    model = build(SMALL)
    whole, split = _by_name(model), _by_name(model, is_per_head=True)
    changed = {name: split[name] for name in whole if whole[name] != split[name]}
    assert {name.split("self_attention.")[-1] for name in changed} == {
        "linear_q_up_proj.weight",
        "linear_kv_up_proj.weight",
    }
    assert {s.num_blocks for s in changed.values()} == {SMALL.num_attention_heads}
    params = dict(model.named_parameters())
    rows = {
        name.split(".")[-2]: params[name].shape[0] // s.num_blocks for name, s in changed.items()
    }
    assert rows == {
        "linear_q_up_proj": SMALL.qk_head_dim + SMALL.qk_pos_emb_head_dim,
        "linear_kv_up_proj": SMALL.qk_head_dim + SMALL.v_head_dim,
    }


def test_without_a_query_latent_the_query_projection_is_the_one_split_by_heads():
    specs = _by_name(build(replace(SMALL, q_lora_rank=None)), is_per_head=True)
    found = {name.split(".")[-2] for name, s in specs.items() if s and s.has_whole_blocks}
    assert found == {"linear_q_proj", "linear_kv_up_proj"}


def test_the_router_can_be_left_to_adamw():
    model = build(SMALL)
    by_muon, by_adamw = _by_name(model), _by_name(model, is_router_muon=False)
    moved = {name for name in by_muon if by_muon[name] and not by_adamw[name]}
    assert len(moved) == SMALL.num_layers - SMALL.num_dense_layers
    assert all("router" in name for name in moved)


class TEGroupedLinear(torch.nn.Module):
    """Stands in for Transformer Engine's: the name is all that is looked at."""

    is_expert = False

    def __init__(self, experts, rows, cols, is_single):
        super().__init__()
        if is_single:
            self.weight = torch.nn.Parameter(torch.randn(experts, rows, cols))
        else:
            for expert in range(experts):
                setattr(self, f"weight{expert}", torch.nn.Parameter(torch.randn(rows, cols)))


class TEColumnParallelGroupedLinear(TEGroupedLinear):
    """A subclass, as upstream's are."""


class GroupedExperts(torch.nn.Module):
    """The part of upstream's TEGroupedMLP that matters."""

    def __init__(self, config, is_single):
        super().__init__()
        self.config = config
        self.linear_fc1 = TEColumnParallelGroupedLinear(3, 8, 5, is_single)
        self.linear_fc2 = TEGroupedLinear(3, 5, 4, is_single)


def _grouped(is_single):
    model = build(SMALL)
    model.decoder.layers[1].mlp.experts = GroupedExperts(model.config, is_single)
    return model, model.decoder.layers[1].mlp.experts


def test_grouped_experts_are_a_matrix_each_and_two_where_gate_and_up_are_fused():
    model, experts = _grouped(is_single=False)
    specs = muon_matrices([model])
    for module, blocks in ((experts.linear_fc1, 2), (experts.linear_fc2, 1)):
        found = [specs[param] for param in module.parameters()]
        assert found == [MatrixSpec(blocks, -1, is_expert=True)] * 3


def test_experts_in_one_three_dimensional_weight_are_never_left_to_adamw():
    model, experts = _grouped(is_single=True)
    specs = muon_matrices([model])
    assert specs[experts.linear_fc1.weight].num_blocks == 6
    assert specs[experts.linear_fc2.weight].num_blocks == 3


def _orthogonalized(weight, num_blocks):
    """The updates of ``weight``, taken for ``num_blocks`` matrices, as the optimizer forms them."""
    world = torch.distributed.group.WORLD
    spec = MatrixSpec(num_blocks, -1, is_expert=True)
    flags = ("--muonclip-dtype", "fp32", "--muon-coefficient-type", "simple")
    settings = settings_from(arguments(SMALL, *flags), build(SMALL).config)
    whole = MatrixParameter("experts", weight, spec, ((0, weight.numel()),), 0)
    group, found = MatrixGroup([whole], world, world, settings), {}
    group.run(lambda params: {p: p.detach().flatten() for p in params}, found.update)
    return found[weight].view(weight.shape)


def test_a_step_on_a_three_dimensional_weight_is_one_on_each_of_its_matrices():
    """[e, gate over up, cols] as the optimizer takes it, against one matrix at a time."""
    _, experts = _grouped(is_single=True)
    weight = experts.linear_fc1.weight
    found = _orthogonalized(weight, 6)
    for expert in range(3):
        for rows in (slice(0, 4), slice(4, 8)):
            matrix, after = weight.detach()[expert, rows], torch.zeros(4, 5)
            muon_step(after, matrix, torch.zeros(4, 5), lr=1.0, weight_decay=0, dtype=torch.float32)
            torch.testing.assert_close(
                after, -0.2 * 5**0.5 * found[expert, rows], atol=1e-6, rtol=1e-5
            )
    assert (_orthogonalized(weight, 3) - found).abs().max() > 0.01


def test_interleaved_gate_and_up_are_refused():
    model = build(SMALL)
    model.config.moe_mlp_glu_interleave_size = 32
    try:
        with pytest.raises(ValueError, match="unset moe_mlp_glu_interleave_size"):
            muon_matrices([model])
    finally:
        model.config.moe_mlp_glu_interleave_size = None


def test_the_table_names_every_parameter_once_and_counts_the_matrices():
    model = build(SMALL)
    lines = classification_table([model]).splitlines()
    rows = [line.split() for line in lines if line.split()[:1] in (["Muon"], ["AdamW"])]
    assert sum(int(row[3]) for row in rows) == len(list(model.parameters()))
    matrices = sum(spec.num_blocks for spec in muon_matrices([model]).values())
    assert lines[-1].startswith(f"Muon: {matrices} matrices")
    (fc1,) = [row for row in rows if "local_experts.linear_fc1" in row[1]]
    moe_layers = SMALL.num_layers - SMALL.num_dense_layers
    count = moe_layers * SMALL.num_moe_experts
    assert fc1[:4] == [
        "Muon",
        "decoder.layers.mlp.experts.local_experts.linear_fc1.weight",
        "ColumnParallelWeight",
        str(count),
    ]
    assert fc1[7:] == [str(2 * count), "20", "x", "48"]
    assert [row[0] for row in rows] == sorted((row[0] for row in rows), reverse=True)
