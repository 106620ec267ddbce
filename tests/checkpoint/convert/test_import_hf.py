import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import warnings

import pytest
import torch

from megatron_k2.checkpoint.block_fp8.layout import SCALE_SUFFIX, is_quantized
from megatron_k2.checkpoint.block_fp8.reference import dequantize
from megatron_k2.checkpoint.block_fp8.scales import ScaleClass
from megatron_k2.checkpoint.convert import import_hf as room
from megatron_k2.checkpoint.convert.export_hf import ExportOptions, export
from megatron_k2.checkpoint.convert.import_hf import ImportOptions, import_hf
from megatron_k2.checkpoint.hf import writer
from megatron_k2.checkpoint.hf.reader import HfSource
from megatron_k2.checkpoint.names.mapping import expand, hf_state_to_megatron
from megatron_k2.checkpoint.names.selection import Selection
from megatron_k2.checkpoint.stream.rows import Dtype
from megatron_k2.checkpoint.torch_dist.reader import MegatronSource
from megatron_k2.errors import UserError
from megatron_k2.fp8 import native
from megatron_k2.run.iterations import find_iteration
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


Q_B = "model.layers.1.self_attn.q_b_proj.weight"


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
    monkeypatch.setattr(writer, "CHUNK_BYTES", 1)
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


def test_nan_codes_come_back_with_their_sign_or_are_named_if_asked(tmp_path):
    weights = as_fp8(random_weights(TINY))
    weights[Q_B].view(torch.uint8)[3, :2] = torch.tensor([0x7F, 0xFF], dtype=torch.uint8)
    write_directory(tmp_path / "hf", TINY, weights)
    import_hf(tmp_path / "hf", tmp_path / "megatron", ImportOptions())
    export(tmp_path / "megatron", tmp_path / "back", ExportOptions(dtype="fp8"))
    assert_same_bytes(tensors(tmp_path / "back"), tensors(tmp_path / "hf"))
    with pytest.raises(UserError, match=rf"model-2-of-3.*'{Q_B}' has a NaN .* row 3"):
        import_hf(tmp_path / "hf", tmp_path / "out", ImportOptions(check_finite=True))


def test_without_a_compiler_a_conversion_writes_the_same_bytes(
    releases, imported, tmp_path, monkeypatch
):
    monkeypatch.setattr(native, "library", lambda: None)
    import_hf(releases / "FP32_AMAX", tmp_path / "out", ImportOptions())
    assert tensor_files(tmp_path / "out") == tensor_files(imported / "FP32_AMAX")
    export(tmp_path / "out", tmp_path / "back", ExportOptions(dtype="fp8"))
    assert_same_bytes(tensors(tmp_path / "back"), tensors(releases / "FP32_AMAX"))


def test_a_part_can_be_taken_there_and_back(releases, tmp_path):
    only = Selection.parse("layers.1-2,experts.1")
    result = import_hf(releases / "bf16", tmp_path / "out", ImportOptions(only=only))
    assert result.num_files == 2
    export(tmp_path / "out", tmp_path / "back", ExportOptions(only=only))
    whole, part = tensors(releases / "bf16"), tensors(tmp_path / "back")
    assert {n.split(".")[2] for n in part if "layers" in n} == {"1", "2"}
    assert {n.split(".")[5] for n in part if ".experts." in n} == {"1"}
    assert_same_bytes(part, {name: whole[name] for name in part})
