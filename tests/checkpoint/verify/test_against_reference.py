import pytest
import torch

from megatron_k2.checkpoint.convert.export_hf import ExportOptions, export
from megatron_k2.checkpoint.verify.against_reference import read_reference, verify_logits
from megatron_k2.cli.convert import main
from megatron_k2.errors import UserError

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def exported(checkpoints, tmp_path_factory):
    """Exports whose saved args say plain rotary and YaRN."""
    out = tmp_path_factory.mktemp("hf")
    options = ExportOptions(dtype="fp32")
    export(checkpoints / "replicated", out / "rope", options)
    export(checkpoints / "tp2", out / "yarn", options)
    return out


@pytest.mark.parametrize("rotary", ["rope", "yarn"])
def test_transformers_computes_megatrons_logits(checkpoints, exported, rotary):
    found = verify_logits(exported / rotary, checkpoints / f"logits_{rotary}.pt")
    assert found.missing_keys == found.unexpected_keys == ()
    assert found.max_abs_reference > 1
    assert found.max_abs_difference < 2e-5
    assert found.argmax_agreement == 1


def test_yarn_taken_for_plain_rotary_is_seen(checkpoints, exported):
    found = verify_logits(exported / "yarn", checkpoints / "logits_rope.pt")
    assert found.max_abs_difference > 1e-2


def test_rotary_rows_in_halves_instead_of_pairs_are_seen(checkpoints, exported, tmp_path):
    """The wrong variant of the layout fact that ``mapping`` rests on."""
    import shutil

    from safetensors.torch import load_file, save_file

    from tests.checkpoint.build_checkpoints import TINY

    wrong = shutil.copytree(exported / "rope", tmp_path / "wrong")
    order = torch.arange(TINY.qk_pos_emb_head_dim).view(-1, 2).t().flatten() + TINY.kv_lora_rank
    for shard in wrong.glob("*.safetensors"):
        state = load_file(shard)
        for name in [name for name in state if "kv_a_proj_with_mqa" in name]:
            state[name][TINY.kv_lora_rank :] = state[name][order]
        save_file(state, shard, metadata={"format": "pt"})
    assert verify_logits(wrong, checkpoints / "logits_rope.pt").max_abs_difference > 1e-2


def test_command_line_answers_by_exit_code(checkpoints, exported, capsys):
    command = ["verify-logits", str(exported / "rope"), "--reference"]
    assert main([*command, str(checkpoints / "logits_rope.pt")]) == 0
    assert main([*command, str(checkpoints / "logits_yarn.pt")]) == 1
    assert "max |difference|" in capsys.readouterr().out


def test_a_file_that_is_no_reference_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_reference(tmp_path / "absent.pt")
    torch.save({"tokens": torch.zeros(1, 4)}, tmp_path / "half.pt")
    with pytest.raises(UserError, match="'tokens' and 'logits'"):
        read_reference(tmp_path / "half.pt")
    torch.save({"tokens": torch.zeros(1, 4), "logits": torch.zeros(1, 5, 7)}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match="differ in batch or sequence"):
        read_reference(tmp_path / "odd.pt")
