"""A run read as an export of it would be, without one; a release beside it.

The oracle is the directory that ``convert export`` writes: names, shape, every bit. A merge of
adapters is compared in ``tests/sft/lora/test_export.py``.
"""

import dataclasses

import pytest
import torch

from megatron_k2.checkpoint.convert.export_hf import ExportOptions, export
from megatron_k2.checkpoint.convert.import_hf import ImportOptions, import_hf
from megatron_k2.checkpoint.stored_model import open_model
from megatron_k2.checkpoint.torch_dist.reader import MegatronSource
from megatron_k2.errors import UserError
from tests.checkpoint.build_checkpoints import TINY
from tests.checkpoint.hf_directories import as_fp8, random_weights, write_directory

LATENT_FREE = dataclasses.replace(TINY, q_lora_rank=None, num_mtp_layers=1)


def tensors(directory):
    return {name: tensor.clone() for name, tensor in open_model(directory).tensors()}


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name].float(), expected[name].float()) for name in expected
    )


@pytest.mark.parametrize("preset", [TINY, LATENT_FREE], ids=["TINY", "an MTP layer, no q latent"])
def test_a_run_is_read_as_its_export(tmp_path, preset):
    weights = random_weights(preset, torch.float32)
    predicted = f"model.layers.{preset.num_layers}."
    if preset.num_mtp_layers:  # Megatron's share the model's
        weights[f"{predicted}embed_tokens.weight"] = weights["model.embed_tokens.weight"]
        weights[f"{predicted}shared_head.head.weight"] = weights["lm_head.weight"]
    release = write_directory(tmp_path / "release", preset, weights)
    import_hf(release, tmp_path / "run", ImportOptions())
    export(tmp_path / "run", tmp_path / "hf", ExportOptions(dtype="fp32"))
    run, exported = open_model(tmp_path / "run"), open_model(tmp_path / "hf")
    assert run.preset == exported.preset
    assert run.expert_groups == exported.expert_groups == (1, 1)
    expected = {n: t for n, t in tensors(tmp_path / "hf").items() if not n.startswith(predicted)}
    assert same(tensors(tmp_path / "run"), expected)
    assert (len(expected) < len(weights)) is bool(preset.num_mtp_layers)


def test_groups_of_experts_are_read_from_a_runs_arguments(tmp_path):
    preset = dataclasses.replace(TINY, num_moe_experts=8, moe_router_topk=4)
    groups = {"n_group": 4, "topk_group": 2}
    release = write_directory(tmp_path / "release", preset, random_weights(preset), **groups)
    import_hf(release, tmp_path / "run", ImportOptions())
    assert open_model(tmp_path / "run").expert_groups == (4, 2)


def test_an_import_of_block_fp8_is_the_release_dequantised(tmp_path):
    release = write_directory(tmp_path / "release", TINY, as_fp8(random_weights(TINY)))
    import_hf(release, tmp_path / "run", ImportOptions())
    assert same(tensors(tmp_path / "run"), tensors(release))


def test_a_run_that_does_not_say_its_preset_is_refused(tmp_path, monkeypatch):
    release = write_directory(tmp_path / "release", TINY, random_weights(TINY))
    import_hf(release, tmp_path / "run", ImportOptions())
    monkeypatch.setattr(MegatronSource, "args", None)
    with pytest.raises(UserError, match="does not say its preset"):
        open_model(tmp_path / "run")
    with pytest.raises(UserError, match="no such directory"):
        open_model(tmp_path / "nowhere")
