import dataclasses
import errno
import json
import multiprocessing
import os
import shutil
import signal
import warnings

import pytest
import torch

from megatron_k2.checkpoint import import_hf as room
from megatron_k2.checkpoint import import_units, safetensors_stream
from megatron_k2.checkpoint.compare import compare, open_weights
from megatron_k2.checkpoint.export import ExportOptions, export
from megatron_k2.checkpoint.fp8 import dequantize
from megatron_k2.checkpoint.fp8_layout import SCALE_SUFFIX, is_quantized
from megatron_k2.checkpoint.fp8_scales import ScaleClass
from megatron_k2.checkpoint.hf_source import HfSource
from megatron_k2.checkpoint.import_hf import ImportOptions, import_hf
from megatron_k2.checkpoint.iterations import find_iteration
from megatron_k2.checkpoint.mapping import expand, hf_state_to_megatron
from megatron_k2.checkpoint.megatron_source import MegatronSource
from megatron_k2.checkpoint.rows import Dtype
from megatron_k2.checkpoint.selection import Selection
from megatron_k2.errors import UserError
from tests.checkpoint.build_checkpoints import TINY
from tests.checkpoint.hf_directories import as_fp8, random_weights, write_directory

CLASSES = (ScaleClass.BF16_AMAX, ScaleClass.FP32_AMAX, ScaleClass.OTHER)

RELEASE_FILES = (
    "generation_config.json",
    "tokenizer_config.json",
    "modeling_deepseek.py",
    "LICENSE",
)

WIDE = dataclasses.replace(
    TINY, hidden_size=256, ffn_hidden_size=384, q_lora_rank=128, kv_lora_rank=120, v_head_dim=64
)
"""Several blocks a matrix, with ragged edges: 120 and 128 latent rows, 20-row experts."""


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """One model as bf16 and fp32, and a wider one as FP8 with each class of scales."""
    out = tmp_path_factory.mktemp("releases")
    write_directory(out / "bf16", TINY, random_weights(TINY), leftovers=True)
    write_directory(out / "fp32", TINY, random_weights(TINY, torch.float32))
    for kind in CLASSES:
        write_directory(out / kind.name, WIDE, as_fp8(random_weights(WIDE), kind))
    return out


@pytest.fixture(scope="module")
def imported(releases, tmp_path_factory):
    out = tmp_path_factory.mktemp("megatron")
    for path in releases.iterdir():
        import_hf(path, out / path.name, ImportOptions())
    return out


@pytest.fixture
def copy(releases, tmp_path):
    """A release that a test may damage."""
    return shutil.copytree(releases / "FP32_AMAX", tmp_path / "copy")


@pytest.fixture(autouse=True)
def _quiet():
    warnings.filterwarnings("ignore", message="Could not determine rank")


def tensors(directory):
    source = HfSource(directory)
    return {name: source.read(name).tensor().clone() for name in source.stored}


def assert_same_bytes(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8)), name


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_there_and_back_is_the_same_bytes_and_the_same_config(releases, imported, tmp_path, dtype):
    export(imported / dtype, tmp_path / "back", ExportOptions(dtype=dtype))
    expected = {k: v for k, v in tensors(releases / dtype).items() if "inv_freq" not in k}
    assert_same_bytes(tensors(tmp_path / "back"), expected)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    settings = json.loads((releases / dtype / "config.json").read_text())
    assert config == settings | ({"torch_dtype": "float32"} if dtype == "fp32" else {})
    for name in RELEASE_FILES:
        assert (tmp_path / "back" / name).read_bytes() == (releases / dtype / name).read_bytes()


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_megatron_to_hugging_face_and_back_is_the_same_bytes(imported, tmp_path, dtype):
    export(imported / dtype, tmp_path / "hf", ExportOptions(dtype=dtype))
    import_hf(tmp_path / "hf", tmp_path / "again", ImportOptions())
    before, after = (
        MegatronSource(find_iteration(directory))
        for directory in (imported / dtype, tmp_path / "again")
    )
    assert before.shapes == after.shapes
    for name in before.shapes:
        assert before.read(name).equals(after.read(name)), name
        assert before.locations[name].dtype == after.locations[name].dtype, name


def test_what_is_stored_is_the_rules_applied_in_memory(releases, imported):
    hf_state = tensors(releases / "bf16")
    expected = hf_state_to_megatron(hf_state, TINY)
    source = MegatronSource(find_iteration(imported / "bf16"))
    assert source.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    for name, tensor in expected.items():
        assert torch.equal(source.read(name).tensor(), tensor), name


@pytest.mark.parametrize("kind", CLASSES)
def test_fp8_comes_back_byte_for_byte_whatever_its_scales(releases, imported, tmp_path, kind):
    result = export(imported / kind.name, tmp_path / "back", ExportOptions(dtype="fp8"))
    assert_same_bytes(tensors(tmp_path / "back"), tensors(releases / kind.name))
    assert result.blocks["fresh"] == 0 < result.blocks["kept"]
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == json.loads((releases / kind.name / "config.json").read_text())


@pytest.mark.parametrize("kind", CLASSES)
def test_without_the_sources_scales_fp8_keeps_what_its_class_can(
    releases, imported, tmp_path, kind
):
    bare = shutil.copytree(imported / kind.name, tmp_path / "bare")
    shutil.rmtree(bare / "hf_source")
    export(bare, tmp_path / "back", ExportOptions(dtype="fp8"))
    source, back = tensors(releases / kind.name), tensors(tmp_path / "back")
    codes = [name for name in source if is_quantized(name)]
    same_codes = all(source[n].view(torch.uint8).equal(back[n].view(torch.uint8)) for n in codes)
    same_scales = all(source[n + SCALE_SUFFIX].equal(back[n + SCALE_SUFFIX]) for n in codes)
    assert same_codes == (kind is not ScaleClass.OTHER)
    assert same_scales == (kind is ScaleClass.BF16_AMAX)


@pytest.mark.parametrize("kind", CLASSES)
def test_an_import_says_which_class_of_scales_it_met(releases, tmp_path, kind):
    result = import_hf(releases / kind.name, tmp_path / "out", ImportOptions())
    # a power of two can by chance be what a bf16 amax gives
    assert max(result.scale_classes, key=result.scale_classes.get) == kind
    assert len(result.scale_classes) == 1 or kind is ScaleClass.OTHER


def test_fp8_import_is_transformers_own_dequantisation_bit_for_bit(tmp_path):
    """Its own conversion step; loading a whole model with it needs the package accelerate."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    # transformers divides rows by the scale grid, so every dimension is below 128 or a multiple
    weights = as_fp8(random_weights(TINY), ScaleClass.FP32_AMAX)
    write_directory(tmp_path / "hf", TINY, weights)
    import_hf(tmp_path / "hf", tmp_path / "out", ImportOptions())
    source = MegatronSource(find_iteration(tmp_path / "out"))
    theirs = Fp8Dequantize(None)
    for pair in expand(TINY):
        for name, shape, begin in pair.parts():
            if is_quantized(name):
                scales = weights[name + SCALE_SUFFIX]
                expected = theirs._dequantize_one(weights[name], scales, torch.bfloat16)
                rows = slice(begin, begin + shape[0])
                assert torch.equal(source.read(pair.megatron, rows).tensor(), expected), name


def test_fp8_can_be_widened_to_fp32_which_holds_the_products(releases, tmp_path):
    import_hf(releases / "OTHER", tmp_path / "out", ImportOptions(dtype="fp32"))
    source = MegatronSource(find_iteration(tmp_path / "out"))
    hf = HfSource(releases / "OTHER")
    name = "model.layers.0.self_attn.o_proj.weight"
    codes, scales = hf.read(name).tensor(), hf.read(name + SCALE_SUFFIX).tensor()
    found = source.read("decoder.layers.0.self_attention.linear_proj.weight")
    assert torch.equal(found.tensor(), dequantize(codes, scales, torch.float32))


def test_the_result_does_not_depend_on_how_rows_are_cut(releases, imported, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_stream, "CHUNK_BYTES", 1)
    import_hf(releases / "FP32_AMAX", tmp_path / "cut", ImportOptions())
    export(tmp_path / "cut", tmp_path / "back", ExportOptions(dtype="fp8"))
    whole, cut = (
        MegatronSource(find_iteration(directory))
        for directory in (imported / "FP32_AMAX", tmp_path / "cut")
    )
    for name in whole.shapes:
        assert whole.read(name).equals(cut.read(name)), name
    assert_same_bytes(tensors(tmp_path / "back"), tensors(releases / "FP32_AMAX"))


def files_of(directory):
    return {
        path.relative_to(directory): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def import_until_killed(source, target):
    def kill_after_the_first_file(done, total):
        if done:
            os.kill(os.getpid(), signal.SIGKILL)

    import_hf(source, target, ImportOptions(), kill_after_the_first_file)


def tensor_files(directory):
    return {p: b for p, b in files_of(directory).items() if p.suffix == ".distcp"}


def test_a_killed_import_goes_on_where_it_was_and_ends_the_same(releases, imported, tmp_path):
    target = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(
        target=import_until_killed, args=(releases / "bf16", target)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not target.exists()
    first = tmp_path / "out.partial" / "release" / "__0_0.distcp"
    before = first.stat().st_ino
    import_hf(releases / "bf16", target, ImportOptions())
    assert (target / "release" / "__0_0.distcp").stat().st_ino == before  # not written again
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    expected = tensor_files(imported / "bf16")
    assert tensor_files(target) == expected


def test_leftovers_of_another_import_are_not_taken(releases, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(room, "_finish", fail)
        with pytest.raises(RuntimeError):
            import_hf(releases / "bf16", tmp_path / "out", ImportOptions())
    import_hf(releases / "fp32", tmp_path / "out", ImportOptions())
    location = MegatronSource(find_iteration(tmp_path / "out")).locations
    assert location["output_layer.weight"].dtype is Dtype.FP32


def test_a_receipt_torn_by_a_power_cut_is_taken_for_none(releases, imported, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(room, "_finish", fail)
        with pytest.raises(RuntimeError):
            import_hf(releases / "bf16", tmp_path / "out", ImportOptions())
    partial = tmp_path / "out.partial"
    torn, whole = (tmp_path / "out.partial.receipts" / f"__{i}_0.distcp.json" for i in (0, 1))
    torn.write_bytes(torn.read_bytes()[:50])
    before = [(partial / "release" / path.stem).stat().st_ino for path in (torn, whole)]
    import_hf(releases / "bf16", tmp_path / "out", ImportOptions())
    after = [(tmp_path / "out" / "release" / path.stem).stat().st_ino for path in (torn, whole)]
    assert [old == new for old, new in zip(before, after, strict=True)] == [False, True]
    assert tensor_files(tmp_path / "out") == tensor_files(imported / "bf16")


@pytest.mark.slow
def test_two_workers_write_what_one_writes(releases, imported, tmp_path):
    import_hf(releases / "FP32_AMAX", tmp_path / "two", ImportOptions(num_workers=2))
    assert tensor_files(tmp_path / "two") == tensor_files(imported / "FP32_AMAX")
    options = ExportOptions(dtype="fp8", num_workers=2)
    export(tmp_path / "two", tmp_path / "back", options)
    assert_same_bytes(tensors(tmp_path / "back"), tensors(releases / "FP32_AMAX"))


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
            r"embed_tokens.weight: has shape \[61, 256\], .* \[61, 128\]",
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
    releases, tmp_path, monkeypatch
):
    real = import_units.write_chunk

    def full_at_the_second_layer(file, placement, *rest):
        if placement.pair.layer == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, placement, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(import_units, "write_chunk", full_at_the_second_layer)
        message = r"__1_0.distcp.*: the disk is full at 'model.layers.1.*run the same command again"
        with pytest.raises(UserError, match=message):
            import_hf(releases / "bf16", tmp_path / "out", ImportOptions())
    assert not (tmp_path / "out").exists()
    import_hf(releases / "bf16", tmp_path / "out", ImportOptions())


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    releases, tmp_path, monkeypatch
):
    usage = shutil._ntuple_diskusage(10**6, 10**6, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"the disk has 0\.0 GB free"):
        import_hf(releases / "bf16", tmp_path / "out", ImportOptions())
    assert not list(tmp_path.iterdir())


def test_a_part_can_be_taken_there_and_back(releases, tmp_path):
    only = Selection.parse("layers.1-2,experts.1")
    result = import_hf(releases / "bf16", tmp_path / "out", ImportOptions(only=only))
    assert result.num_files == 2
    export(tmp_path / "out", tmp_path / "back", ExportOptions(only=only))
    whole, part = tensors(releases / "bf16"), tensors(tmp_path / "back")
    assert {n.split(".")[2] for n in part if "layers" in n} == {"1", "2"}
    assert {n.split(".")[5] for n in part if ".experts." in n} == {"1"}
    assert_same_bytes(part, {name: whole[name] for name in part})


@pytest.mark.parametrize("text", ["layers", "layers.3-1", "heads.1", "layers.1,layers.2"])
def test_a_part_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="--only"):
        Selection.parse(text)


@pytest.mark.parametrize("text", ["layers.3", "experts.4", "layers.0,experts.1"])
def test_a_part_the_model_has_not_is_refused(releases, tmp_path, text):
    only = Selection.parse(text)
    with pytest.raises(UserError, match=f"--only {text[:6]}.*has no such layer or expert"):
        import_hf(releases / "bf16", tmp_path / "out", ImportOptions(only=only))
    release = open_weights(releases / "bf16")
    with pytest.raises(UserError, match="there are no such"):
        compare(release, release, only)
    assert not list(tmp_path.iterdir())
