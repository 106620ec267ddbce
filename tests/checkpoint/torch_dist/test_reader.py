import shutil

import pytest
import torch

from megatron_k2.checkpoint.torch_dist.reader import MegatronSource
from megatron_k2.errors import UserError
from megatron_k2.run.iterations import find_iteration
from tests.checkpoint.build_checkpoints import ITERATION, LAYOUTS, PADDED_VOCAB, TINY

pytestmark = pytest.mark.dist


def source_of(checkpoints, layout):
    return MegatronSource(find_iteration(checkpoints / layout))


@pytest.fixture
def copy(checkpoints, tmp_path):
    """A checkpoint that a test may damage."""
    return shutil.copytree(checkpoints / "tp2", tmp_path / "copy")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_is_the_state_dicts_bit_for_bit_at_any_layout(checkpoints, layout):
    state = torch.load(checkpoints / "state.pt")
    source = source_of(checkpoints, layout)
    assert source.shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert not torch.distributed.is_initialized()
    for name, tensor in state.items():
        assert torch.equal(source.read(name).tensor(), tensor), name


def test_a_wrong_expert_index_would_be_seen(checkpoints):
    state = torch.load(checkpoints / "state.pt")
    name = "decoder.layers.1.mlp.experts.local_experts.{}.linear_fc1.weight"
    assert not torch.equal(
        source_of(checkpoints, "ep2").read(name.format(0)).tensor(), state[name.format(1)]
    )


def test_optimizer_state_in_the_same_files_is_not_taken_for_weights(checkpoints):
    from torch.distributed.checkpoint import FileSystemReader

    source = source_of(checkpoints, "tp2")
    stored = FileSystemReader(source.directory).read_metadata().state_dict_metadata
    assert "optimizer.state.exp_avg.decoder.final_layernorm.weight" in stored
    assert not [name for name in source.shapes if "optimizer" in name]


def test_layers_stacked_in_one_tensor_come_apart(tmp_path):
    """What an integer ``moe_layer_freq`` makes Megatron save."""
    import torch.distributed.checkpoint as dcp

    experts = torch.arange(3 * 4 * 6 * 8.0).view(3, 4, 6, 8)
    norms = torch.arange(3 * 8.0).view(3, 8)
    stacked = {
        "decoder.layers.mlp.experts.experts.linear_fc1.weight": experts,
        "decoder.layers.input_layernorm.weight": norms,
    }
    dcp.save(stacked, checkpoint_id=tmp_path, no_dist=True)
    source = MegatronSource(tmp_path)
    assert len(source.shapes) == 3 * 4 + 3
    name = "decoder.layers.2.mlp.experts.local_experts.1.linear_fc1.weight"
    assert torch.equal(source.read(name).tensor(), experts[2, 1])
    assert torch.equal(source.read("decoder.layers.1.input_layernorm.weight").tensor(), norms[1])
    assert source.args is None


def test_rows_of_padding_need_not_be_read(checkpoints):
    state = torch.load(checkpoints / "state.pt")
    source = source_of(checkpoints, "tp2")
    name = "output_layer.weight"
    assert source.shapes[name] == (PADDED_VOCAB, TINY.hidden_size)
    rows = source.read(name, slice(TINY.vocab_size))
    assert torch.equal(rows.tensor(), state[name][: TINY.vocab_size])


def test_saved_arguments_are_read_without_a_process_group(checkpoints):
    source = source_of(checkpoints, "ep2")
    assert source.common["iteration"] == ITERATION
    assert source.args.num_experts == TINY.num_moe_experts


def test_an_iteration_directory_may_be_given_itself(checkpoints):
    inner = checkpoints / "pp2" / "iter_0000010"
    assert find_iteration(inner) == inner == find_iteration(checkpoints / "pp2", 10)


@pytest.mark.parametrize(
    ("iteration", "message"), [(99, "no iteration 99; saved are: 10"), (None, "--iteration: 10")]
)
def test_a_checkpoint_that_is_not_there_says_which_are(copy, iteration, message):
    (copy / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(UserError, match=message):
        find_iteration(copy, iteration)


def test_a_directory_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_iteration(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        find_iteration(tmp_path / "absent")


def test_a_save_that_did_not_finish_is_refused(copy):
    (copy / "iter_0000010" / ".metadata").unlink()
    with pytest.raises(UserError, match="did not finish"):
        MegatronSource(find_iteration(copy))


def test_a_truncated_shard_is_refused_before_anything_is_read(copy):
    shard = copy / "iter_0000010" / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"__1_0.distcp is truncated"):
        MegatronSource(find_iteration(copy))
    shard.unlink()
    with pytest.raises(UserError, match=r"__1_0.distcp is missing"):
        MegatronSource(find_iteration(copy))


def test_a_damaged_chunk_is_named_when_it_is_read(copy):
    shard = copy / "iter_0000010" / "__0_0.distcp"
    shard.write_bytes(bytes(shard.stat().st_size))
    source = MegatronSource(find_iteration(copy))
    with pytest.raises(UserError, match=r"'decoder.final_layernorm.weight' cannot be read"):
        source.read("decoder.final_layernorm.weight")
