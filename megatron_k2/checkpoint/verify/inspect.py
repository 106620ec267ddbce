"""What a checkpoint of either kind holds, from names and shapes alone; no weight is read."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint.hf.packed_int4 import PACKED, SCALE, SHAPE
from megatron_k2.checkpoint.hf.reader import HfSource, HfTensor, is_hf_directory
from megatron_k2.checkpoint.stream.rows import Dtype
from megatron_k2.checkpoint.torch_dist.reader import MegatronSource
from megatron_k2.run.iterations import find_iteration

_LAYOUT = (
    ("TP", "tensor_model_parallel_size"),
    ("PP", "pipeline_model_parallel_size"),
    ("CP", "context_parallel_size"),
    ("EP", "expert_model_parallel_size"),
    ("world", "world_size"),
)


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of one kind: names that differ in layer and expert only."""

    pattern: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    count: int
    num_bytes: int


@dataclass(frozen=True)
class Inspection:
    """A checkpoint at a glance."""

    facts: dict[str, Any]
    groups: tuple[TensorGroup, ...]

    @property
    def num_tensors(self) -> int:
        """All tensors of the model."""
        return sum(group.count for group in self.groups)

    @property
    def num_bytes(self) -> int:
        """Bytes of the model's tensors."""
        return sum(group.num_bytes for group in self.groups)


def inspect_checkpoint(directory: Path, iteration: int | None = None) -> Inspection:
    """Layers, shapes, dtypes, bytes; of a Megatron checkpoint also step and layout.

    Args:
        directory: Hugging Face directory, or Megatron's ``--save`` directory.
        iteration: of a Megatron checkpoint; default: the latest.
    """
    if is_hf_directory(directory):
        return _inspect_hf(HfSource(directory))
    return _inspect_megatron(MegatronSource(find_iteration(directory, iteration)))


def _inspect_hf(source: HfSource) -> Inspection:
    files = {tensor.file for tensor in source.stored.values()}
    config = source.config
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    facts = {
        "kind": "Hugging Face",
        "model type": config.get("model_type"),
        "layers": config.get("num_hidden_layers"),
        "experts": config.get("n_routed_experts"),
        "quantization": method or "none",
        "shards": len(files),
    }
    tensors = ((name, t.shape, t.dtype) for name, t in _as_they_lie(source))
    return Inspection(facts, _group(tensors))


def _as_they_lie(source: HfSource) -> Iterator[tuple[str, HfTensor]]:
    for name, tensor in source.stored.items():
        if (weight := source.packed.get(name)) is None:
            yield name, tensor
        else:
            parts = ((PACKED, weight.packed), (SCALE, weight.scale), (SHAPE, weight.shape))
            yield from (
                (name.removesuffix(".weight") + suffix, part) for suffix, part in parts if part
            )


def _inspect_megatron(source: MegatronSource) -> Inspection:
    saved = source.args
    layout = " ".join(
        f"{short}{value}" for short, name in _LAYOUT if (value := getattr(saved, name, None))
    )
    facts = {
        "kind": "Megatron torch_dist",
        "checkpoint": source.directory.name,
        "step": source.common.get("iteration"),
        "saved at": layout or "not said",
        "preset": getattr(saved, "preset", None),
        "layers": getattr(saved, "num_layers", None),
        "experts": getattr(saved, "num_experts", None),
        "optimizer": f"{source.num_other_bytes / 1e6:,.1f} MB beside the weights",
        "files": len(list(source.directory.glob("*.distcp"))),
    }
    tensors = ((n, where.shape, where.dtype) for n, where in source.locations.items())
    return Inspection(facts, _group(tensors))


def _group(
    tensors: Iterable[tuple[str, tuple[int, ...], Dtype]],
) -> tuple[TensorGroup, ...]:
    members: dict[str, list[tuple[tuple[int, ...], Dtype]]] = defaultdict(list)
    for name, shape, dtype in tensors:
        members[re.sub(r"\.\d+\.", ".*.", name)].append((shape, dtype))
    return tuple(
        TensorGroup(
            pattern,
            tuple(sorted({shape for shape, _ in found})),
            tuple(sorted({dtype.torch_name for _, dtype in found})),
            len(found),
            sum(math.prod(shape) * dtype.itemsize for shape, dtype in found),
        )
        for pattern, found in sorted(members.items())
    )
