import json

import pytest
import torch

from megatron_k2.checkpoint.convert.import_hf import ImportOptions, import_hf
from megatron_k2.checkpoint.verify.compare import compare, open_weights
from megatron_k2.cli.convert import main
from megatron_k2.errors import UserError
from tests.checkpoint.build_checkpoints import TINY
from tests.checkpoint.hf_directories import as_fp8, random_weights, write_directory

NAME = "model.layers.2.mlp.experts.1.up_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A release, the same with one weight changed, as FP8, and the FP8 one imported."""
    out = tmp_path_factory.mktemp("compare")
    weights = random_weights(TINY)
    write_directory(out / "bf16", TINY, weights)
    write_directory(out / "fp8", TINY, as_fp8(weights))
    weights[NAME] = weights[NAME].clone()
    weights[NAME][3, 5] += 1
    write_directory(out / "changed", TINY, weights)
    import_hf(out / "fp8", out / "megatron", ImportOptions())
    return out


def test_one_changed_weight_is_found_and_nothing_else(folder):
    found = compare(open_weights(folder / "changed"), open_weights(folder / "bf16"))
    assert not found.is_equal
    assert [d.name for d in found.differences if not d.is_equal] == [NAME]
    assert found.differences[0].max_abs == pytest.approx(1, abs=0.01)


def test_an_import_equals_its_fp8_source_by_value(folder):
    found = compare(open_weights(folder / "megatron"), open_weights(folder / "fp8"))
    assert found.is_equal
    assert found.num_equal == 67


def test_fp8_is_off_by_its_rounding(folder):
    found = compare(open_weights(folder / "fp8"), open_weights(folder / "bf16"))
    assert 0.01 < found.differences[0].relative < 0.05


def test_nan_on_one_side_is_a_difference_and_on_both_is_none(tmp_path):
    weights = random_weights(TINY)
    write_directory(tmp_path / "a", TINY, weights)
    weights["model.norm.weight"][2] = torch.nan
    write_directory(tmp_path / "b", TINY, weights)
    found = compare(open_weights(tmp_path / "a"), open_weights(tmp_path / "b"))
    assert found.num_equal == 66
    again = compare(open_weights(tmp_path / "b"), open_weights(tmp_path / "b"))
    assert again.num_equal == 67


def test_tensors_of_one_side_only_are_named(folder, tmp_path):
    weights = random_weights(TINY)
    del weights[NAME]
    write_directory(tmp_path / "less", TINY, weights)
    found = compare(open_weights(tmp_path / "less"), open_weights(folder / "bf16"))
    assert (found.only_in_a, found.only_in_b) == ((), (NAME,))
    assert not found.is_equal


def test_other_shapes_are_refused_by_name(folder, tmp_path):
    weights = random_weights(TINY) | {NAME: torch.zeros(3, 3)}
    write_directory(tmp_path / "odd", TINY, weights)
    with pytest.raises(UserError, match=rf"'{NAME}' has shape \[3, 3\] in A"):
        compare(open_weights(tmp_path / "odd"), open_weights(folder / "bf16"))


def test_command_line_prints_the_largest_differences_and_answers_by_exit_code(folder, capsys):
    same = ["verify", str(folder / "fp8"), str(folder / "megatron")]
    assert main([*same, "--logits"]) == 0
    assert "same argmax 100.00%" in capsys.readouterr().out
    other = ["verify", str(folder / "changed"), str(folder / "bf16")]
    assert main(other) == 1
    assert NAME in capsys.readouterr().out.split()
    assert main([*other, "--only", "layers.0-1"]) == 0


def test_inspect_tells_either_kind_without_reading_weights(folder, capsys):
    assert main(["inspect", str(folder / "fp8")]) == 0
    out = capsys.readouterr().out
    row = ["model.layers.*.mlp.experts.*.up_proj.weight", "8", "[20,", "32]", "float8_e4m3fn"]
    assert row in [line.split()[:5] for line in out.splitlines()]
    assert "115 tensors" in out
    assert main(["inspect", str(folder / "megatron")]) == 0
    out = capsys.readouterr().out
    row = ["output_layer.weight", "1", "[61,", "32]", "bfloat16"]
    assert row in [line.split()[:5] for line in out.splitlines()]
    assert "TP1 PP1 CP1 EP1 world1" in out


def test_command_line_imports_exports_and_projects(folder, tmp_path, capsys):
    out, back = tmp_path / "megatron", tmp_path / "hf"
    command = ["import", str(folder / "fp8"), str(out), "--project", "kimi-k2"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "115 source tensors: 67 weights, 48 FP8 scales" in printed
    assert "48 bf16 amax / 448" in printed
    assert "kimi-k2 at this rate" in printed
    assert "2.05 TB of disk" in printed
    assert main(["export", str(out), str(back), "--dtype", "fp8"]) == 0
    assert "48 untouched" in capsys.readouterr().out
    config = json.loads((back / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert main(["audit", str(back)]) == 0
