"""Where a checkpoint's weights came from: what an import kept of its Hugging Face directory.

An import writes ``hf_source/`` beside the weights: the source's ``config.json``, generation config,
tokenizer files, and the scales of its FP8 weights. A run that started from an import has it in its
saved arguments (``--pretrained-checkpoint`` or ``--load``), so an export finds it from any later
checkpoint.
"""

from collections.abc import Iterator
from pathlib import Path

from megatron_k2.checkpoint.torch_dist.reader import MegatronSource
from megatron_k2.errors import UserError

SOURCE_DIR = "hf_source"
SCALES_FILE = "scales.safetensors"


def find_source_release(
    megatron_dir: Path, source: MegatronSource, given: Path | None = None
) -> Path | None:
    """The directory of the source release's files, or None where there is no trail.

    Args:
        megatron_dir: as the user named the checkpoint.
        source: the checkpoint, opened.
        given: by ``--source``: an import's directory, its ``hf_source``, or any directory with a
            ``config.json``.

    Raises:
        UserError: if ``given`` has no ``config.json``.
    """
    if given is not None:
        for directory in (given / SOURCE_DIR, given):
            if (directory / "config.json").is_file():
                return directory
        raise UserError(f"--source {given}: no config.json there, nor in its {SOURCE_DIR}")
    for directory in _trail(megatron_dir, source):
        if (directory / SOURCE_DIR / "config.json").is_file():
            return directory / SOURCE_DIR
    return None


def _trail(megatron_dir: Path, source: MegatronSource) -> Iterator[Path]:
    yield megatron_dir
    yield source.directory.parent
    for name in ("pretrained_checkpoint", "load"):
        path = getattr(source.args, name, None)
        if path:
            yield Path(path)
