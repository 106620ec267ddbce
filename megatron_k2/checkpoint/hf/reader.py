"""A Hugging Face directory opened for reading: names, shapes, dtypes, and rows on request.

Headers are read at once and checked against the files' lengths, so a damaged directory is refused
before anything is written. Data is memory-mapped: what ``read`` returns are views of the page
cache, which cost no anonymous memory and are dropped by the kernel under pressure.
"""

import functools
import json
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, override

import numpy as np

from megatron_k2.checkpoint.block_fp8.layout import SCALE_SUFFIX
from megatron_k2.checkpoint.hf.downloads import find_release, other_formats, require_file
from megatron_k2.checkpoint.hf.language_model import language_config, language_tensors
from megatron_k2.checkpoint.hf.packed_int4 import (
    METHOD,
    PACKED,
    SCALE,
    SHAPE,
    PackedWeight,
    find_packed,
    group_size_of,
    shape_of,
    unpacked,
)
from megatron_k2.checkpoint.names.rules import IGNORED_HF_SUFFIXES
from megatron_k2.checkpoint.stream.mapped_files import MappedFiles, bring_in, shortened
from megatron_k2.checkpoint.stream.rows import BY_SAFETENSORS_NAME, Dtype, Rows
from megatron_k2.errors import UserError
from megatron_k2.run.iterations import METADATA, has_tracker

INDEX = "model.safetensors.index.json"

_MAX_HEADER_BYTES = 100_000_000  # of the safetensors format


@dataclass(frozen=True)
class HfTensor:
    """Where one tensor lies in a safetensors file, and of what shape and dtype it is."""

    file: str
    offset: int
    """Of its first byte in the file."""
    shape: tuple[int, ...]
    dtype: Dtype

    @property
    def num_bytes(self) -> int:
        """Bytes it takes in its file."""
        return math.prod(self.shape) * self.dtype.itemsize


class HfSource:
    """An opened directory of safetensors files."""

    def __init__(self, directory: Path, files: Iterable[str] | None = None) -> None:
        """Open a directory.

        Args:
            directory: of the checkpoint, or a hub cache folder of it.
            files: read these alone, whatever the index says.
        """
        self.directory = directory = find_release(directory)
        self.stored: dict[str, HfTensor] = {}
        listed = _listed_files(directory) if files is None else dict.fromkeys(files)
        for file, names in listed.items():
            header = read_header(directory, file)
            if names is not None and (absent := names - header.keys()):
                raise UserError(
                    f"{directory / file} has no '{min(absent)}', which {INDEX} places in it"
                )
            wanted = header.keys() if names is None else names
            if twice := wanted & self.stored.keys():
                first = self.stored[min(twice)].file
                raise UserError(f"{directory}: '{min(twice)}' is in {first} and in {file}")
            self.stored |= {name: header[name] for name in wanted}
        self.left_out: tuple[str, ...] = ()
        """Tensors of other models than the language model, in ``stored`` under its own names."""
        part = language_tensors(self.stored)
        self.is_part = part is not None
        if part is not None:
            self.stored, self.left_out = part
        self._files = MappedFiles()
        self.orders: dict[str, np.ndarray] = {}
        """Weights of which ``read`` gives the rows in another order than they lie."""
        self.packed = self._found_packed()
        """Weights in packed int4: in ``stored`` as the wholes that ``read`` makes of them."""
        for name, weight in self.packed.items():
            whole = shape_of(name, weight.packed, weight.scale, weight.group_size)
            for suffix in (PACKED, SCALE, SHAPE):
                self.stored.pop(name.removesuffix(".weight") + suffix, None)
            self.stored[name] = HfTensor(weight.packed.file, -1, whole, weight.scale.dtype)

    def _found_packed(self) -> dict[str, PackedWeight[HfTensor]]:
        """Of a release whose ``config.json`` says how they are packed."""
        has_config = (self.directory / "config.json").exists()
        if not has_config or not any(name.endswith(PACKED) for name in self.stored):
            return {}
        said = self.config.get("quantization_config")
        if not isinstance(said, dict) or said.get("quant_method") != METHOD:
            return {}
        return find_packed(self.stored, group_size_of(said))

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The parsed ``config.json`` of the release, that of its language model."""
        return language_config(read_json(self.directory / "config.json"))

    @property
    def weights(self) -> dict[str, HfTensor]:
        """What a model reads: no FP8 scales, no leftover buffers."""
        leftovers = (SCALE_SUFFIX, *IGNORED_HF_SUFFIXES)
        return {k: v for k, v in self.stored.items() if not k.endswith(leftovers)}

    @property
    def is_fp8(self) -> bool:
        """Whether any weight is block FP8."""
        return any(tensor.dtype is Dtype.E4M3 for tensor in self.stored.values())

    def read(self, name: str, rows: slice = slice(None), *, is_computed: bool = False) -> Rows:
        """Rows of a tensor as it is stored; do not write to them.

        Args:
            name: Hugging Face's.
            rows: which; the step must be 1.
            is_computed: whether they are computed with: a copy, else a view of the mapped file.

        Of a weight in packed int4 they are what it means.
        """
        if (weight := self.packed.get(name)) is not None:
            self._require_shape(name, weight)
            packed = self._read(weight.packed, rows, is_computed=True)
            scale = self._read(weight.scale, rows, is_computed=True)
            return unpacked(packed, scale, weight.group_size)
        if (order := self.orders.get(name)) is None:
            return self._read(self.stored[name], rows, is_computed=is_computed)
        places = order[rows]  # of one head and its neighbours at most
        first = int(places.min(initial=0 if not len(places) else places[0]))
        near = self._read(
            self.stored[name], slice(first, int(places.max(initial=first)) + 1), is_computed=True
        )
        return Rows(near.bits[places - first], near.dtype)

    def _require_shape(self, name: str, weight: PackedWeight[HfTensor]) -> None:
        """Compare what lies beside a weight: a page of its file for each, so not before."""
        if weight.shape is None:
            return
        said = self._read(weight.shape, slice(None), is_computed=True).bits.tolist()
        if said != list(self.stored[name].shape):
            own = name.removesuffix(".weight") + SHAPE
            raise UserError(
                f"{self.directory / weight.shape.file}: '{own}' says {said}, packed integers and "
                f"scales are of {list(self.stored[name].shape)}"
            )

    def _read(self, tensor: HfTensor, rows: slice, *, is_computed: bool) -> Rows:
        begin, end, _ = rows.indices(tensor.shape[0])
        row = tensor.shape[1:]
        path = self.directory / tensor.file
        mapped = self._files.map(path)
        if len(mapped) < tensor.offset + tensor.num_bytes:
            raise shortened(path)
        at = tensor.offset + begin * math.prod(row) * tensor.dtype.itemsize
        bits = np.ndarray((end - begin, *row), tensor.dtype.numpy, mapped, at)
        found = self._files.settled(bits, path) if is_computed else bring_in(bits, path)
        return Rows(found, tensor.dtype)

    @override
    def __repr__(self) -> str:
        return f"HfSource({self.directory}, {len(self.stored)} tensors)"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: if it is missing, or no JSON object.
    """
    if not (path.exists() or path.is_symlink()):
        raise UserError(f"{path.parent} has no {path.name}: not a Hugging Face checkpoint")
    require_file(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); download it again") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be one; download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def _listed_files(directory: Path) -> dict[str, set[str] | None]:
    """File -> tensors the index places in it; None: no index, so whatever the file has."""
    index = directory / INDEX
    if not (index.exists() or index.is_symlink()):
        files = sorted(path.name for path in directory.glob("*.safetensors"))
        if not files:
            others = other_formats(directory)
            also = f", only {', '.join(others[:3])}: take the safetensors release" if others else ""
            raise UserError(f"{directory} has neither {INDEX} nor any *.safetensors file{also}")
        return dict.fromkeys(files)
    listed: dict[str, set[str] | None] = {}
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise UserError(f"{directory / INDEX} has no 'weight_map' from tensors to files")
    for name, file in weight_map.items():
        names = listed.setdefault(file, set())
        assert names is not None  # set two lines above
        names.add(name)
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise UserError(f"{directory / INDEX} places '{name}' in '{file}', outside {directory}")
    for file, names in listed.items():
        if not ((directory / file).exists() or (directory / file).is_symlink()):
            raise UserError(
                f"{directory / file} is missing, though {INDEX} places '{min(names or '')}' in it; "
                "download it again"
            )
    return listed


def read_header(directory: Path, file: str) -> dict[str, HfTensor]:
    """Tensors of one safetensors file of a directory, checked against its length.

    Raises:
        UserError: naming the file, and the tensor where one is at fault.
    """
    path = directory / file
    require_file(path)
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise UserError(f"{path} is truncated: its header does not fit in {size} bytes")
        try:
            header = json.loads(stream.read(length))
            entries = {k: v for k, v in header.items() if k != "__metadata__"}
        except (ValueError, AttributeError, RecursionError):
            raise UserError(f"{path} has a damaged header; download it again") from None
    place = directory, file, 8 + length, size
    return {name: _entry(name, entry, *place) for name, entry in entries.items()}


def _entry(
    name: str, entry: Any, directory: Path, file: str, data_start: int, size: int
) -> HfTensor:
    path = directory / file
    damaged = UserError(f"{path}: '{name}' has a damaged entry in the header; download it again")
    try:
        kind, shape = entry["dtype"], tuple(map(operator.index, entry["shape"]))
        begin, end = map(operator.index, entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise damaged from None
    if min(begin, *shape, 0) < 0:
        raise damaged
    if not isinstance(kind, str) or kind not in BY_SAFETENSORS_NAME:
        known = ", ".join(BY_SAFETENSORS_NAME)
        raise UserError(f"{path}: '{name}' has dtype {kind}; readable are {known}")
    tensor = HfTensor(file, data_start + begin, shape, BY_SAFETENSORS_NAME[kind])
    if end - begin != tensor.num_bytes:
        raise UserError(f"{path}: '{name}' has {end - begin} bytes, not what its shape says")
    if data_start + end > size:
        raise UserError(
            f"{path} is truncated: '{name}' ends at byte {data_start + end}, the file at {size}"
        )
    return tensor


def is_hf_directory(directory: Path) -> bool:
    """Whether this looks like a Hugging Face checkpoint, or a download of one, not a Megatron one.

    One that is damaged counts: opening it says what is wrong.
    """
    if not directory.is_dir() or has_tracker(directory) or (directory / METADATA).exists():
        return False
    marks = (INDEX, "config.json", "*.safetensors", "snapshots", "models--*")
    return any(_any(directory.glob(mark)) for mark in marks) or bool(other_formats(directory))


def _any(items: Iterable[object]) -> bool:
    return next(iter(items), None) is not None
