"""A model on the disk, a run's or a Hugging Face directory, opened to be computed with.

A run's weights pass under Hugging Face's names as they are read, adapters added to their base: what
an export would hold, without one. Its shape is what the export's ``config.json`` would say.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_k2.checkpoint.block_fp8.layout import SCALE_SUFFIX
from megatron_k2.checkpoint.hf.config_keys import expert_groups
from megatron_k2.checkpoint.hf.downloads import find_release
from megatron_k2.checkpoint.hf.language_model import language_config
from megatron_k2.checkpoint.hf.preset import preset_from_hf
from megatron_k2.checkpoint.hf.reader import HfSource, is_hf_directory, read_json
from megatron_k2.checkpoint.hf.release import open_release
from megatron_k2.checkpoint.lora.adapters import AdapterSource, is_adapters
from megatron_k2.checkpoint.lora.merged import MergedSource, RowSource
from megatron_k2.checkpoint.names.audit import require_clean
from megatron_k2.checkpoint.names.mapping import Pair, expand
from megatron_k2.checkpoint.run_config import run_config, settle_preset, template_of
from megatron_k2.checkpoint.torch_dist.reader import MegatronSource
from megatron_k2.checkpoint.torch_dist.source_trail import find_source_release
from megatron_k2.errors import UserError
from megatron_k2.presets import ModelPreset
from megatron_k2.run.iterations import find_iteration

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class StoredModel:
    """What an engine needs of a directory."""

    preset: ModelPreset
    expert_groups: tuple[int, int]
    """Into how many groups experts are parted, how many of them a token may use."""
    tensors: "Callable[[], Iterator[tuple[str, Tensor]]]"
    """Every weight once, by Hugging Face's names. A tensor shares memory with its file's mapping:
    copy it, do not keep or write to it."""


def open_model(directory: Path, iteration: int | None = None) -> StoredModel:
    """A model of either kind; its tensors are read when they are drawn.

    Args:
        directory: a Hugging Face one, or what training had as ``--save``.
        iteration: of a run; None: the latest.

    Raises:
        UserError: it is neither, is damaged, or its model cannot be said in a ``config.json``.
    """
    if is_hf_directory(directory):
        release = open_release(directory)
        groups = expert_groups(release.source.config)
        return StoredModel(release.preset, groups, partial(tensors_of, release.source))
    source = MegatronSource(find_iteration(directory, iteration))
    adapters = AdapterSource(source) if is_adapters(source) else None
    if adapters is not None:
        directory = adapters.base_directory
        source = MegatronSource(directory)
    if getattr(source.args, "preset", None) is None:
        raise UserError(
            f"{source.directory} does not say its preset; load what 'megatron-k2 convert export "
            "--preset NAME' makes of it"
        )
    settled = settle_preset(source.args, None, None)
    pairs = list(expand(settled))
    require_clean(source.shapes, settled)
    rows: RowSource = source
    if adapters is not None:
        adapters.require_matched(pairs)
        rows = MergedSource(source, adapters, pairs)
    template = template_of(find_source_release(directory, source))
    config = run_config(source.args, settled, template)
    own = [pair for pair in pairs if pair.layer < settled.num_layers]
    preset = preset_from_hf(config, settled.name)
    return StoredModel(preset, expert_groups(config), partial(_tensors_of_run, rows, own))


def described_model(directory: Path) -> StoredModel:
    """A model of which nothing but ``config.json`` need lie there; it has no tensors.

    Raises:
        UserError: there is no ``config.json``, or it is of another kind of model.
    """
    config = language_config(read_json(find_release(directory) / "config.json"))
    return StoredModel(preset_from_hf(config, None), expert_groups(config), lambda: iter(()))


def _tensors_of_run(rows: RowSource, pairs: list[Pair]) -> "Iterator[tuple[str, Tensor]]":
    """Prediction layers are left out: nothing that is computed with here has them."""
    for pair in pairs:
        for name, shape, begin in pair.parts():
            part = slice(begin, begin + shape[0])
            yield name, rows.read(pair.megatron, part, is_computed=True).tensor()


def tensors_of(source: HfSource) -> "Iterator[tuple[str, Tensor]]":
    """Weights of a Hugging Face directory; block FP8 is dequantised to bf16."""
    import torch

    from megatron_k2.checkpoint.block_fp8 import reference

    for name in source.weights:
        tensor = source.read(name, is_computed=True).tensor()
        if tensor.dtype == torch.float8_e4m3fn:
            scales = source.read(name + SCALE_SUFFIX, is_computed=True).tensor()
            tensor = reference.dequantize(tensor, scales)
        yield name, tensor
