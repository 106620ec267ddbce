"""The datasets that a run's flags name: made where they are synthetic, else looked for at once.

Megatron opens them after the model is built, which takes minutes on a cluster.
"""

import json
from pathlib import Path
from typing import Any

from megatron_k2.data.indexed import bin_path, idx_path
from megatron_k2.errors import UserError
from megatron_k2.run.flags import RunFlags

SPLITS = ("train", "valid", "test")
"""Keys that Megatron reads of ``--per-split-data-args-path``, all of them."""
REMOTE = "://"
"""Part of a path that lies on a remote store, which cannot be looked at here."""


def read_blend(path: Path) -> dict[str, list[str]]:
    """A ``--per-split-data-args-path`` file: weights and prefixes of each split, alternating.

    Raises:
        UserError: if Megatron could not read it; its own words are a ``KeyError``.
    """
    try:
        read: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"blend {path}: not readable as JSON ({error})") from None
    if not isinstance(read, dict) or not set(SPLITS) <= set(read):
        raise UserError(
            f"blend {path}: expected an object with the keys {', '.join(SPLITS)}; a split without "
            "data is null"
        )
    blends = {split: read[split] or [] for split in SPLITS}
    return {k: b.split() if isinstance(b, str) else list(map(str, b)) for k, b in blends.items()}


def prefixes_of(blend: list[str]) -> list[str]:
    """Prefixes of a blend with or without weights, told apart as Megatron does."""
    if len(blend) % 2:
        return blend
    try:
        list(map(float, blend[::2]))
    except ValueError:
        return blend
    return blend[1::2]


def data_prefixes(flags: RunFlags) -> list[str]:
    """Prefixes of every split, without repetition."""
    path = flags.per_split_data_args_path
    if path is not None:
        blends = read_blend(Path(path))
    else:
        given = flags.train_data_path, flags.valid_data_path, flags.test_data_path
        blends = {split: list(blend) for split, blend in zip(SPLITS, given, strict=True)}
    return list(dict.fromkeys(p for split in SPLITS for p in prefixes_of(blends[split])))


def make_synthetic(flags: RunFlags, vocab_size: int, eod_id: int) -> None:
    """Write what ``--synthetic-data`` asks for.

    Raises:
        UserError: for a prefix that names no domain.
    """
    from megatron_k2.data.synthetic import write_domain

    if "--synthetic-data" in flags:
        for prefix in data_prefixes(flags):
            write_domain(Path(prefix), vocab_size, eod_id)


def check_files(flags: RunFlags) -> None:
    """Refuse datasets that are absent.

    Raises:
        UserError: naming the first.
    """
    if "--synthetic-data" in flags:
        return
    for prefix in data_prefixes(flags):
        if REMOTE in prefix:
            continue
        for path in (idx_path(Path(prefix)), bin_path(Path(prefix))):
            if not path.is_file():
                raise UserError(
                    f"data: {path} does not exist; prepare it with megatron-k2 data prepare, or "
                    "name another with --train-data-path (in a recipe --set data.root=…)"
                )
