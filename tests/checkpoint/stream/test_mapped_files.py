"""A file that becomes shorter while it is read: a sentence, where the kernel would send SIGBUS."""

import errno
import faulthandler
import mmap
import multiprocessing
import os

import numpy as np
import pytest

from megatron_k2.checkpoint.convert import export_shards, import_files
from megatron_k2.checkpoint.convert.export_hf import ExportOptions, export
from megatron_k2.checkpoint.convert.import_hf import ImportOptions, import_hf
from megatron_k2.checkpoint.hf.reader import HfSource
from megatron_k2.checkpoint.stream.jobs import naming_the_file
from megatron_k2.checkpoint.stream.mapped_files import MappedFiles, bring_in
from megatron_k2.checkpoint.verify.compare import compare, open_weights
from megatron_k2.errors import UserError
from tests.checkpoint.build_checkpoints import TINY
from tests.checkpoint.hf_directories import as_fp8, random_weights, write_directory

SHORTER = "has become shorter while it was read"


@pytest.fixture(params=["bf16", "fp8"])
def release(request, tmp_path):
    weights = random_weights(TINY)
    weights = as_fp8(weights) if request.param == "fp8" else weights
    return write_directory(tmp_path / "hf", TINY, weights)


def cut_after_the_first_file(path):
    def progress(done, total):
        if done:
            os.truncate(path, 3000)

    return progress


def test_an_import_says_so_and_goes_on_when_the_file_is_whole_again(release, tmp_path):
    shard = release / "model-3-of-3.safetensors"
    content, times = shard.read_bytes(), shard.stat()
    with pytest.raises(UserError, match=rf"{shard.name} {SHORTER}"):
        import_hf(release, tmp_path / "out", ImportOptions(), cut_after_the_first_file(shard))
    assert not (tmp_path / "out").exists()
    shard.write_bytes(content)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    import_hf(release, tmp_path / "out", ImportOptions())
    assert compare(open_weights(tmp_path / "out"), open_weights(release)).is_equal


def test_an_export_says_so(release, tmp_path):
    import_hf(release, tmp_path / "megatron", ImportOptions())
    shard = max((tmp_path / "megatron" / "release").glob("__2_*.distcp"))
    with pytest.raises(UserError, match=rf"{shard.name} {SHORTER}"):
        export(
            tmp_path / "megatron",
            tmp_path / "back",
            ExportOptions(),
            cut_after_the_first_file(shard),
        )
    assert not (tmp_path / "back").exists()


def test_a_file_cut_before_it_is_mapped_is_named_too(release):
    source = HfSource(release)
    for length in (3000, 0):
        os.truncate(release / "model-2-of-3.safetensors", length)
        with pytest.raises(UserError, match=f"model-2-of-3.safetensors {SHORTER}"):
            source.read("model.layers.1.self_attn.o_proj.weight")


def view_of_a_cut_file(path):
    path.write_bytes(bytes(16 * mmap.PAGESIZE))
    bits = np.ndarray(16 * mmap.PAGESIZE, np.uint8, MappedFiles().map(path))
    os.truncate(path, mmap.PAGESIZE)
    return bits


def test_pages_that_are_gone_are_seen_as_they_are_brought_in(tmp_path):
    with pytest.raises(UserError, match=SHORTER):
        bring_in(view_of_a_cut_file(tmp_path / "file"), tmp_path / "file")


@pytest.mark.parametrize("begin", [0, 100, 3 * mmap.PAGESIZE + 5])
def test_what_is_computed_with_is_a_copy_and_a_file_cut_meanwhile_is_a_sentence(tmp_path, begin):
    path, content = tmp_path / "file", np.random.default_rng(0).bytes(16 * mmap.PAGESIZE)
    path.write_bytes(content)
    files = MappedFiles()
    bits = np.ndarray((7, 11), "<u2", files.map(path), begin)
    found = files.settled(bits, path)
    assert found.tobytes() == content[begin : begin + 154]
    assert found.flags.c_contiguous
    os.truncate(path, begin + 100)
    assert found.sum() > 0  # its own memory
    with pytest.raises(UserError, match=SHORTER):
        files.settled(bits, path)


@pytest.mark.parametrize("verb", ["import", "export"])
def test_a_file_cut_in_the_moment_that_fp8_is_computed_leaves_the_process_alive(
    tmp_path, verb, monkeypatch
):
    """With ``--workers 1`` there is no other process to tell of it."""
    release = write_directory(tmp_path / "hf", TINY, as_fp8(random_weights(TINY)))
    import_hf(release, tmp_path / "megatron", ImportOptions())
    room, name = {
        "import": (import_files, "dequantized"),
        "export": (export_shards, "requantized"),
    }[verb]
    compute = getattr(room, name)

    def cut_and_compute(*args, **named):
        for path in (*release.glob("*.safetensors"), *tmp_path.glob("megatron/**/*.distcp")):
            os.truncate(path, 0)
        return compute(*args, **named)

    monkeypatch.setattr(room, name, cut_and_compute)
    convert = {
        "import": lambda out: import_hf(release, out, ImportOptions()),
        "export": lambda out: export(tmp_path / "megatron", out, ExportOptions(dtype="fp8")),
    }
    with pytest.raises(UserError, match=SHORTER):  # at the next rows that are read
        convert[verb](tmp_path / "out")


def test_without_either_look_the_process_would_end(tmp_path):
    """What the looks are for: the wrong variant, in a process of its own."""

    def read():
        faulthandler.disable()
        view_of_a_cut_file(tmp_path / "file").sum()

    process = multiprocessing.get_context("fork").Process(target=read)
    process.start()
    process.join(60)
    assert process.exitcode < 0


def test_pages_that_vanish_as_they_are_written_out_are_a_sentence(release, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EFAULT, "Bad address")

    monkeypatch.setattr(import_files, "write_chunk", fail)
    with pytest.raises(UserError, match=r"a file that was read at 'model.* has become shorter"):
        import_hf(release, tmp_path / "out", ImportOptions())
    bits = view_of_a_cut_file(tmp_path / "file")
    with (tmp_path / "copy").open("wb") as file, pytest.raises(UserError, match="shorter"):
        with naming_the_file(tmp_path / "copy"):
            file.write(bits[8 * mmap.PAGESIZE :].data)
