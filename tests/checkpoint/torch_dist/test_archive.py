"""Archives and ``.metadata``, held against torch: each reads what the other writes."""

import io
import os
import pickle
import signal
import struct
import subprocess
import sys
import zipfile
from argparse import Namespace

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_k2.checkpoint.stream.rows import WEIGHTS, rows_of
from megatron_k2.checkpoint.torch_dist import archive
from megatron_k2.checkpoint.torch_dist.archive import (
    read_object,
    read_tensor,
    write_object,
    write_tensor,
)
from megatron_k2.checkpoint.torch_dist.metadata import Extent, Index, read_index, write_index
from megatron_k2.checkpoint.torch_dist.pickles import Instance, stand_in
from megatron_k2.errors import UserError
from megatron_k2.fp8 import native
from megatron_k2.run.iterations import METADATA
from tests.checkpoint.build_checkpoints import TINY
from tests.checkpoint.hf_directories import as_fp8, random_weights, write_directory
from tests.support.paths import REPOSITORY


def saved(value):
    content = io.BytesIO()
    torch.save(value, content)
    return content.getbuffer()


BASE = torch.arange(60.0).view(5, 12)
TENSORS = {
    "whole": BASE,
    "bf16": BASE.bfloat16(),
    "fp16": BASE.half(),
    "rows of a larger one": BASE[2:4],
    "columns": BASE[:, 3:7],
    "transposed": BASE.t(),
    "repeated": BASE[:1].expand(4, 12),
    "a parameter": torch.nn.Parameter(BASE.clone()),
    "a number": torch.tensor(2.5),
}


@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS)
def test_what_torch_saved_is_read_bit_for_bit(tensor):
    assert torch.equal(read_tensor(saved(tensor)).tensor(), tensor)


def test_wrong_strides_would_be_seen():
    pickled = saved(BASE.t())
    assert not torch.equal(read_tensor(pickled).tensor(), BASE.reshape(12, 5))


@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize("shape", [(3,), (5, 7), (1, 2, 3), (1, 128, 9)])
def test_what_is_written_torch_loads(dtype, shape):
    tensor = torch.randn(shape).to(getattr(torch, dtype.torch_name))
    file = io.BytesIO(b"not at its beginning")
    file.seek(0, io.SEEK_END)
    offset, length = write_tensor(file, rows_of(tensor))
    content = file.getvalue()[offset : offset + length]
    assert len(file.getvalue()) == offset + length
    found = torch.load(io.BytesIO(content), weights_only=True)
    assert torch.equal(found, tensor)
    assert found.untyped_storage().nbytes() == tensor.nbytes
    assert read_tensor(memoryview(content)).equals(rows_of(tensor))
    data = archive.records(memoryview(content))["data/0"]
    assert (offset + content.find(bytes(data))) % archive.ALIGNMENT == 0


def test_arguments_are_read_by_torch_as_torch_writes_them():
    plain = {
        "rope_type": "yarn",
        "freq": [0, 1],
        "big": 2**40,
        "none": None,
        "on": True,
        "lr": 1e-4,
    }
    content = io.BytesIO()
    write_object(content, [Namespace(**plain, params_dtype=stand_in("torch", "bfloat16"))])
    content.seek(0)
    with torch.serialization.safe_globals([Namespace]):
        (found,) = torch.load(content, weights_only=True)
    assert found == Namespace(**plain, params_dtype=torch.bfloat16)
    (again,) = read_object(saved([found]))
    assert {k: v for k, v in vars(again).items() if k != "params_dtype"} == plain
    assert again.params_dtype is stand_in("torch", "bfloat16")


def test_a_pickle_that_would_run_something_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'evil'}",)

    found = read_object(saved({"args": Evil(), "enum": signal.Signals.SIGTERM}))
    assert isinstance(found["args"], Instance)
    assert "system" in repr(found["args"])
    assert found["enum"].args == (15,)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="expected a tensor"):
        read_tensor(saved(Evil()))


def test_an_archive_beyond_4_gib_is_read(monkeypatch):
    """As one lies on disk: sizes, offsets and the directory in their 64-bit fields."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 50)
    records = archive.records(saved(BASE))
    large = io.BytesIO()
    with zipfile.ZipFile(large, "w") as written:
        for name, data in records.items():
            written.writestr(f"archive/{name}", bytes(data))
    assert b"PK\6\6" in large.getvalue()
    assert torch.equal(read_tensor(large.getbuffer()).tensor(), BASE)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:40],
        lambda content: bytes(len(content)),
        lambda content: content.replace(b"PK\3\4", b"PK\0\0"),
    ],
    ids=["cut", "cut short", "zeros", "records elsewhere"],
)
def test_a_damaged_archive_is_an_error(damage):
    with pytest.raises((ValueError, struct.error, KeyError)):
        read_tensor(memoryview(damage(bytes(saved(BASE)))))


def test_a_compressed_archive_is_an_error():
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(100))
    with pytest.raises(ValueError, match="uncompressed"):
        read_tensor(packed.getbuffer())


def test_a_tensor_that_reaches_beyond_its_storage_is_an_error():
    size = stand_in("torch._utils", "_rebuild_tensor_v2")
    kind = stand_in("torch", "FloatStorage")
    storage = archive.Persistent(("storage", kind, "0", "cpu", 4))
    pickled = archive.write_pickle(size(storage, 0, (5,), (1,), False, None))
    content = io.BytesIO()
    archive._write(content, {"data.pkl": pickled, "data/0": bytes(16)})
    with pytest.raises(ValueError, match="a storage of 4 elements"):
        read_tensor(content.getbuffer())


def test_metadata_is_read_as_torch_reads_it_and_written_so_that_torch_reads_the_same(tmp_path):
    state = {"a": BASE, "b.weight": BASE.bfloat16(), "moment": torch.arange(3)}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    theirs = pickle.loads((tmp_path / METADATA).read_bytes())
    index = read_index(tmp_path)
    assert index.tensors.keys() == state.keys()
    for key, tensor in index.tensors.items():
        stored = theirs.state_dict_metadata[key]
        assert tensor.size == tuple(stored.size)
        assert getattr(torch, tensor.dtype.torch_name) == stored.properties.dtype
        for chunk, expected in zip(tensor.chunks, stored.chunks, strict=True):
            assert (chunk.offsets, chunk.sizes) == (tuple(expected.offsets), tuple(expected.sizes))
            info = theirs.storage_data[dcp.metadata.MetadataIndex(key, chunk.offsets)]
            assert chunk.extent == Extent(info.relative_path, info.offset, info.length)
    objects = {"common": Extent("__0_0.distcp", 0, 5)}
    write_index(tmp_path, Index(index.tensors, objects))
    ours = pickle.loads((tmp_path / METADATA).read_bytes())
    assert ours.state_dict_metadata == theirs.state_dict_metadata | {
        "common": dcp.metadata.BytesStorageMetadata()
    }
    assert {k: v for k, v in ours.storage_data.items() if k.fqn != "common"} == theirs.storage_data
    assert read_index(tmp_path) == Index(index.tensors, objects)
    target = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    dcp.load(target, checkpoint_id=tmp_path, no_dist=True)
    assert all(torch.equal(target[key], state[key]) for key in state)


def test_metadata_of_another_kind_is_refused_by_name(tmp_path):
    (tmp_path / METADATA).write_bytes(pickle.dumps(Namespace(a=1)))
    with pytest.raises(UserError, match=r"\.metadata holds Namespace\(a=1\), expected"):
        read_index(tmp_path)
    (tmp_path / METADATA).write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match=r"\.metadata cannot be read"):
        read_index(tmp_path)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_a_conversion_needs_neither_torch_nor_megatron(tmp_path, dtype):
    if dtype == "fp8" and native.library() is None:
        pytest.skip("no C compiler here")
    weights = random_weights(TINY)
    release = write_directory(tmp_path / "hf", TINY, as_fp8(weights) if dtype == "fp8" else weights)
    program = f"""
import sys
from megatron_k2.cli.main import main
assert main(["convert", "import", {str(release)!r}, {str(tmp_path / "m")!r}]) == 0
assert main(["convert", "inspect", {str(tmp_path / "m")!r}]) == 0
assert main(["convert", "export", {str(tmp_path / "m")!r}, {str(tmp_path / "back")!r},
             "--dtype", {dtype!r}]) == 0
print([name for name in ("torch", "megatron", "safetensors") if name in sys.modules])
"""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
