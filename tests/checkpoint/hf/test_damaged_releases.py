"""Damaged releases, parts that are none, disks that fill up: refused by file and tensor."""

import contextlib
import errno
import json
import shutil

import pytest
import torch

from megatron_k2.checkpoint.block_fp8.layout import SCALE_SUFFIX
from megatron_k2.checkpoint.convert import import_files
from megatron_k2.checkpoint.convert.export_hf import ExportOptions, export
from megatron_k2.checkpoint.convert.import_hf import ImportOptions, import_hf
from megatron_k2.checkpoint.names.selection import Selection
from megatron_k2.checkpoint.verify.compare import compare, open_weights
from megatron_k2.cli.convert import main
from megatron_k2.errors import UserError
from tests.checkpoint.build_checkpoints import TINY
from tests.checkpoint.hf_directories import as_fp8, random_weights, write_directory


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """In block FP8."""
    return write_directory(
        tmp_path_factory.mktemp("release") / "hf", TINY, as_fp8(random_weights(TINY))
    )


@pytest.fixture
def copy(release, tmp_path):
    """A release that a test may damage."""
    return shutil.copytree(release, tmp_path / "copy")


def truncate(path):
    file = path / "model-2-of-3.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def drop(name):
    def change(path):
        index = json.loads((path / "model.safetensors.index.json").read_text())
        del index["weight_map"][name]
        (path / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def set_config(**fields):
    def change(path):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | fields))

    return change


def set_entry(**fields):
    """Of one tensor in its shard's header."""

    def change(path):
        file = path / "model-2-of-3.safetensors"
        content = file.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        header[Q_B] |= fields
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])

    return change


def give_a_tensor_twice(path):
    (path / "model.safetensors.index.json").unlink()
    shutil.copy(path / "model-2-of-3.safetensors", path / "model-9.safetensors")


Q_B = "model.layers.1.self_attn.q_b_proj.weight"
SHARD, INDEX = "model-2-of-3.safetensors", "model.safetensors.index.json"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"
HTML = "<!DOCTYPE html><html>Access to model is restricted.</html>"
DEEP = "[" * 100_000 + "]" * 100_000


def replaced(name, text):
    return lambda path: (path / name).write_text(text)


def linked_to_nothing(name):
    def change(path):
        (path / name).unlink()
        (path / name).symlink_to("../gone")

    return change


def as_directory(name):
    def change(path):
        (path / name).unlink()
        (path / name).mkdir()

    return change


def of_another_format(*names):
    def change(path):
        for file in path.glob("model*"):
            file.unlink()
        for name in names:
            (path / name).write_bytes(b"")

    return change


def deep_header(path):
    text = f'{{"a": {DEEP}}}'.encode()
    (path / SHARD).write_bytes(len(text).to_bytes(8, "little") + text)


INSTEAD = {
    "deep config": (replaced("config.json", f'{{"a": {DEEP}}}'), "config.json is nested too"),
    "deep index": (replaced(INDEX, f'{{"weight_map": {DEEP}}}'), "index.json is nested too"),
    "deep header": (deep_header, f"{SHARD} has a damaged header"),
    "config gone": (linked_to_nothing("config.json"), r"config.json is a link to \.\./gone,"),
    "index gone": (linked_to_nothing(INDEX), r"index.json is a link to \.\./gone,"),
    "shard gone": (linked_to_nothing(SHARD), rf"{SHARD} is a link to \.\./gone,"),
    "config a folder": (as_directory("config.json"), "config.json is a directory"),
    "index a folder": (as_directory(INDEX), "index.json is a directory"),
    "shard a folder": (as_directory(SHARD), f"{SHARD} is a directory, expected a file"),
    "config a pointer": (replaced("config.json", LFS), "config.json is a pointer of Git LFS"),
    "index a pointer": (replaced(INDEX, LFS), "index.json is a pointer of Git LFS"),
    "shard a pointer": (replaced(SHARD, LFS), f"{SHARD} is a pointer of Git LFS.*git lfs pull"),
    "shard a page": (replaced(SHARD, HTML), f"{SHARD} is a page of HTML"),
    "config a page": (replaced("config.json", HTML), "config.json is a page of HTML"),
    "a hole": (replaced(f"{SHARD}.aria2", ""), f"{SHARD} is not complete: {SHARD}.aria2 lies"),
    "shard a GGUF": (replaced(SHARD, "GGUF\3"), f"{SHARD} is a GGUF file"),
    "shard a pickle": (replaced(SHARD, "PK\3\4"), f"{SHARD} is a file of torch.save"),
    "shard empty": (replaced(SHARD, ""), f"{SHARD} is truncated"),
    "GGUF alone": (of_another_format("k2-q4.gguf"), "nor any .*, only k2-q4.gguf: take the safet"),
    "bin alone": (
        of_another_format("pytorch_model-00001-of-00002.bin"),
        "only pytorch_model-00001-of-00002.bin: take the safetensors",
    ),
    "quantization a list": (set_config(quantization_config=[1]), r"=\[1\], expected an object"),
    "text for JSON": (replaced("config.json", "null"), "holds a NoneType, expected an object"),
    "no text": (lambda path: (path / "config.json").write_bytes(b"\xff\xfe{"), "not valid JSON"),
}


@pytest.mark.parametrize(("change", "message"), INSTEAD.values(), ids=INSTEAD)
def test_what_stands_in_a_files_place_is_named_by_every_command(copy, tmp_path, change, message):
    change(copy)
    for command in (["import", copy, tmp_path / "out"], ["audit", copy]):
        with pytest.raises(UserError, match=message):
            main([str(word) for word in command])
    for command in (["inspect", copy], ["verify", copy, copy, "--only", "layers.0"]):
        with contextlib.suppress(UserError):  # what does not need the damaged place answers
            main([str(word) for word in command])
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncate, r"model-2-of-3.safetensors is truncated: 'model.layers.1.*' ends at byte"),
        (drop(Q_B + SCALE_SUFFIX), rf"{Q_B}: is FP8, but its scales '{Q_B}_scale_inv' are missing"),
        (drop(Q_B), rf"{Q_B}: belongs to the model, but is not in the source"),
        (
            lambda path: (path / "model-3-of-3.safetensors").unlink(),
            r"model-3-of-3.safetensors is missing, though .* places 'model.layers.2.* in it",
        ),
        (
            set_config(hidden_size=128),
            r"embed_tokens.weight: has shape \[61, 32\], .* \[61, 128\]",
        ),
        (set_config(num_hidden_layers=2), r"model.layers.2.*: in the source, no rule consumes it"),
        (set_config(scoring_func="softmax"), r"scoring_func='softmax', supported is 'sigmoid'"),
        (lambda path: (path / "config.json").unlink(), "has no config.json"),
        (set_config(hidden_size="256"), "hidden_size='256', expected a positive number"),
        (set_config(rope_scaling="yarn"), "rope_scaling='yarn', expected an object"),
        (set_entry(data_offsets=[-8, 0]), rf"model-2-of-3.*'{Q_B}' has a damaged entry"),
        (set_entry(dtype=None), rf"model-2-of-3.*'{Q_B}' has dtype None; readable are"),
        (set_entry(shape="ab"), rf"model-2-of-3.*'{Q_B}' has a damaged entry"),
        (
            lambda path: (path / "model.safetensors.index.json").write_text('{"weight_map": [1]}'),
            "index.json has no 'weight_map' from tensors to files",
        ),
        (give_a_tensor_twice, r"'model.layers.1.* is in model-2-of-3.* and in model-9.safetensors"),
    ],
    ids=[
        "truncated shard",
        "missing scale",
        "missing weight",
        "absent file",
        "other shape",
        "fewer layers",
        "other scoring",
        "no config",
        "text for a number",
        "text for an object",
        "negative offset",
        "no dtype",
        "no shape",
        "no index",
        "a tensor twice",
    ],
)
def test_a_damaged_release_is_refused_by_file_and_tensor(copy, tmp_path, change, message):
    change(copy)
    with pytest.raises(UserError, match=message):
        import_hf(copy, tmp_path / "out", ImportOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_nan_is_named_by_file_tensor_and_row_if_asked(tmp_path):
    weights = random_weights(TINY)
    weights["model.layers.1.mlp.experts.2.up_proj.weight"][7, 3] = torch.inf
    write_directory(tmp_path / "hf", TINY, weights)
    import_hf(tmp_path / "hf", tmp_path / "unasked", ImportOptions())
    message = r"model-2-of-3.safetensors: 'model.layers.1.mlp.experts.2.up_proj.weight' .* row 7"
    with pytest.raises(UserError, match=message):
        import_hf(tmp_path / "hf", tmp_path / "out", ImportOptions(check_finite=True))
    with pytest.raises(UserError, match=r"experts.2.linear_fc1.weight' has a NaN .* row 27"):
        export(tmp_path / "unasked", tmp_path / "back", ExportOptions(check_finite=True))


def test_a_disk_that_fills_up_names_file_and_tensor_and_loses_nothing(
    release, tmp_path, monkeypatch
):
    real = import_files.write_chunk

    def full_at_the_second_layer(file, destination, *rest):
        if destination.pair.layer == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, destination, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(import_files, "write_chunk", full_at_the_second_layer)
        message = r"__1_0.distcp.*: the disk is full at 'model.layers.1.*run the same command again"
        with pytest.raises(UserError, match=message):
            import_hf(release, tmp_path / "out", ImportOptions())
    assert not (tmp_path / "out").exists()
    import_hf(release, tmp_path / "out", ImportOptions())


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    release, tmp_path, monkeypatch
):
    usage = shutil._ntuple_diskusage(10**6, 10**6, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"the disk has 0\.0 GB free"):
        import_hf(release, tmp_path / "out", ImportOptions())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["layers", "layers.3-1", "heads.1", "layers.1,layers.2"])
def test_a_part_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="--only"):
        Selection.parse(text)


@pytest.mark.parametrize("text", ["layers.3", "experts.4", "layers.0,experts.1"])
def test_a_part_the_model_has_not_is_refused(release, tmp_path, text):
    only = Selection.parse(text)
    with pytest.raises(UserError, match=f"--only {text[:6]}.*has no such layer or expert"):
        import_hf(release, tmp_path / "out", ImportOptions(only=only))
    weights = open_weights(release)
    with pytest.raises(UserError, match="there are no such"):
        compare(weights, weights, only)
    assert not list(tmp_path.iterdir())
