import filecmp
import json
import multiprocessing
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from megatron_k2.checkpoint.convert.export_hf import ExportOptions, export
from megatron_k2.checkpoint.names.mapping import hf_state_to_megatron, megatron_state_to_hf
from megatron_k2.cli.convert import main
from megatron_k2.errors import UserError
from tests.checkpoint.build_checkpoints import LAYOUTS, PADDED_VOCAB, TINY

pytestmark = pytest.mark.dist
FP32 = ExportOptions(dtype="fp32", model_type="deepseek_v3")


def read_export(directory):
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    state = {}
    for shard in sorted(set(index["weight_map"].values())):
        state |= load_file(directory / shard)
    assert set(index["weight_map"]) == set(state)
    return state, index


@pytest.fixture(scope="module")
def exported(checkpoints, tmp_path_factory):
    directory = tmp_path_factory.mktemp("hf") / "replicated"
    export(checkpoints / "replicated", directory, FP32)
    return directory


def test_every_tensor_goes_back_to_megatrons_bit_for_bit(checkpoints, exported):
    state = torch.load(checkpoints / "state.pt")
    hf_state, index = read_export(exported)
    back = hf_state_to_megatron(hf_state, TINY, padded_vocab_size=PADDED_VOCAB)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        num_rows = TINY.vocab_size if "word_embeddings" in name or "output" in name else None
        assert torch.equal(back[name][:num_rows], tensor[:num_rows]), name
    total = sum(t.numel() * t.element_size() for t in hf_state.values())
    assert index["metadata"]["total_size"] == total


def test_transformers_finds_no_key_missing_and_none_unexpected(exported):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert type(model).__name__ == "DeepseekV3ForCausalLM"
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "replicated"])
def test_any_parallel_layout_exports_the_same_bytes(checkpoints, exported, tmp_path, layout):
    export(checkpoints / layout, tmp_path / "hf", FP32)
    shards = [path.name for path in exported.glob("*.safetensors*")]
    assert len(shards) == TINY.num_layers + 1
    same, different, broken = filecmp.cmpfiles(exported, tmp_path / "hf", shards, shallow=False)
    assert (sorted(same), different, broken) == (sorted(shards), [], [])


def test_shards_are_named_and_cut_as_in_the_release(exported):
    _, index = read_export(exported)
    names = set(index["weight_map"].values())
    assert names == {f"model-{i}-of-3.safetensors" for i in (1, 2, 3)}
    for name, shard in index["weight_map"].items():
        if name.startswith("model.layers."):
            assert shard == f"model-{int(name.split('.')[2]) + 1}-of-3.safetensors"
    assert index["weight_map"]["model.embed_tokens.weight"] == "model-1-of-3.safetensors"
    assert index["weight_map"]["lm_head.weight"] == "model-3-of-3.safetensors"


def test_bf16_rounds_all_but_the_selection_bias(checkpoints, tmp_path):
    export(checkpoints / "ep2", tmp_path / "hf", ExportOptions())
    expected = megatron_state_to_hf(torch.load(checkpoints / "state.pt"), TINY)
    hf_state, _ = read_export(tmp_path / "hf")
    for name, tensor in hf_state.items():
        is_bias = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if is_bias else torch.bfloat16)
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


def test_yarn_is_taken_from_the_run_and_can_be_overruled(checkpoints, tmp_path):
    def config(layout, use_yarn=None):
        directory = tmp_path / f"{layout}-{use_yarn}"
        export(checkpoints / layout, directory, ExportOptions(use_yarn=use_yarn))
        return json.loads((directory / "config.json").read_text())

    assert "rope_scaling" not in config("replicated")
    assert config("tp2")["rope_scaling"]["factor"] == TINY.yarn.rotary_scaling_factor
    assert "rope_scaling" not in config("tp2", use_yarn=False)


def test_model_card_tells_where_the_weights_came_from(exported, checkpoints):
    card = (exported / "README.md").read_text()
    for fact in ("| preset | k2-tiny |", "| iteration | 10 |", "| training tokens | 224 |"):
        assert fact in card
    assert str(checkpoints) not in card


def test_tokenizer_files_come_along(checkpoints, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "unrelated.bin").write_text("")
    options = ExportOptions(tokenizer=tokenizer)
    export(checkpoints / "replicated", tmp_path / "hf", options)
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "hf" / "unrelated.bin").exists()
    (tokenizer / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has none of"):
        export(checkpoints / "replicated", tmp_path / "other", options)


def test_a_tokenizer_with_k2s_chat_tokens_gets_our_template(checkpoints, tmp_path):
    from transformers import AutoTokenizer

    from megatron_k2.chat.template import render_text
    from megatron_k2.data.hf_tokenizer import train_byte_bpe
    from megatron_k2.records.messages import Message

    train_byte_bpe(["some text"], 300, tmp_path / "tokenizer")
    options = ExportOptions(tokenizer=tmp_path / "tokenizer")
    export(checkpoints / "replicated", tmp_path / "hf", options)
    messages = [Message("user", "Tide?"), Message("assistant", "4.2 m")]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = theirs.apply_chat_template([m.to_object() for m in messages], tokenize=False)
    assert text == render_text(messages)
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text("its own")
    export(checkpoints / "replicated", tmp_path / "again", options)
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "its own"


def export_until_killed(source, target):
    def kill_after_the_first_shard(done, total):
        if done:
            os.kill(os.getpid(), signal.SIGKILL)

    export(source, target, ExportOptions(), kill_after_the_first_shard)


def test_a_killed_export_leaves_no_directory_and_the_next_one_succeeds(checkpoints, tmp_path):
    target = tmp_path / "hf"
    arguments = (checkpoints / "replicated", target)
    process = multiprocessing.get_context("fork").Process(
        target=export_until_killed, args=arguments
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not target.exists()
    assert (tmp_path / "hf.partial" / "model-1-of-3.safetensors").exists()
    before = (tmp_path / "hf.partial" / "model-1-of-3.safetensors").stat().st_ino
    export(checkpoints / "replicated", target, ExportOptions())
    assert (target / "model-1-of-3.safetensors").stat().st_ino == before  # not written again
    export(checkpoints / "replicated", tmp_path / "at_once", ExportOptions())
    for path in target.iterdir():
        assert path.read_bytes() == (tmp_path / "at_once" / path.name).read_bytes()
    shutil.rmtree(tmp_path / "at_once")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_preset_that_does_not_fit_is_refused_before_anything_is_written(checkpoints, tmp_path):
    other = ExportOptions(preset="moonlight-16b-a3b")
    source = checkpoints / "replicated"
    # the run's own flags win over a preset's, but for what they do not say
    export(source, tmp_path / "fits", other)
    with pytest.raises(UserError, match="'k3' is not known"):
        export(source, tmp_path / "hf", ExportOptions(preset="k3"))
    with pytest.raises(UserError, match="not one of"):
        export(source, tmp_path / "hf", ExportOptions(dtype="fp4"))
    with pytest.raises(UserError, match="exists already"):
        export(source, tmp_path / "fits", other)
    assert [path.name for path in tmp_path.iterdir()] == ["fits"]


def test_command_line_exports_and_is_quiet_without_a_terminal(checkpoints, tmp_path, capsys):
    target = tmp_path / "hf"
    assert main(["export", str(checkpoints / "pp2"), str(target), "--no-yarn"]) == 0
    captured = capsys.readouterr()
    assert "67 tensors, 3 shards" in captured.out
    assert captured.err == ""
    assert json.loads((target / "config.json").read_text())["model_type"] == "kimi_k2"
