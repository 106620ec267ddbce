"""The datasets that a run's flags name: made where they are synthetic, else looked at at once.

Megatron opens them after the model is built, which takes minutes on a cluster.
"""

import json
import os
from pathlib import Path
from typing import Any

from megatron_k2.data.content import REMOTE, content_hash
from megatron_k2.data.indexed import check_indexed
from megatron_k2.errors import UserError
from megatron_k2.files import sha256_of_json
from megatron_k2.run.flags import RunFlags

SPLITS = ("train", "valid", "test")
"""Keys that Megatron reads of ``--per-split-data-args-path``, all of them."""
ALLOW_OTHER_DATA = "--allow-other-data"
"""Go on from a checkpoint though the training data's content is not what it was."""
SET_MANIFESTS = ("chat.json", "dataset.json")
"""Of a directory of ``data chat``, and of one of ``data prepare``."""
SHOWN = 16
"""Digits of a hash in a message."""


def read_blend(path: Path) -> dict[str, list[str]]:
    """A ``--per-split-data-args-path`` file: weights and prefixes of each split, alternating.

    Raises:
        UserError: if Megatron could not read it; its own words are a ``KeyError``.
    """
    try:
        read: Any = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"blend {path}: not readable as JSON ({error})") from None
    if not isinstance(read, dict) or not set(SPLITS) <= set(read):
        raise UserError(
            f"blend {path}: expected an object with the keys {', '.join(SPLITS)}; a split without "
            "data is null"
        )
    return {split: _words(path, split, read[split]) for split in SPLITS}


def _words(path: Path, split: str, entry: Any) -> list[str]:
    words = entry.split() if isinstance(entry, str) else entry or []
    if not isinstance(words, list) or any(isinstance(word, list | dict) for word in words):
        raise UserError(
            f"blend {path}: '{split}' is {entry!r}; expected weights and prefixes, as a text or a "
            "list of words, or null"
        )
    return list(map(str, words))


def _read_list(path: Path) -> list[str]:
    """A ``--data-args-path`` file: weights and prefixes in one text."""
    try:
        words = path.read_text().split()
    except (OSError, ValueError) as error:
        raise UserError(f"--data-args-path {path}: not readable ({error})") from None
    if not words:
        raise UserError(
            f"--data-args-path {path} is empty; weights and prefixes are expected, "
            "as --data-path takes them"
        )
    return words


def prefixes_of(blend: list[str]) -> list[str]:
    """Prefixes of a blend with or without weights, told apart as Megatron does."""
    if len(blend) % 2:
        return blend
    try:
        list(map(float, blend[::2]))
    except ValueError:
        return blend
    return blend[1::2]


def _blends(flags: RunFlags) -> dict[str, list[str]]:
    """Split -> blend. One blend that ``--split`` divides counts as training's: it is, in part."""
    _check_one_source(flags)
    if flags.per_split_data_args_path is not None:
        return read_blend(Path(flags.per_split_data_args_path))
    if flags.data_args_path is not None:
        return {"train": _read_list(Path(flags.data_args_path))}
    if flags.data_path:
        return {"train": list(flags.data_path)}
    given = flags.train_data_path, flags.valid_data_path, flags.test_data_path
    return {split: list(blend) for split, blend in zip(SPLITS, given, strict=True)}


def _check_one_source(flags: RunFlags) -> None:
    """Megatron takes a blend from one place, and says so by an assertion without words."""
    per_split = flags.train_data_path or flags.valid_data_path or flags.test_data_path
    given = {
        "--data-path": flags.data_path,
        "--data-args-path": flags.data_args_path,
        "--per-split-data-args-path": flags.per_split_data_args_path,
        "--train-data-path (or --data, --valid-data-path, --test-data-path)": per_split,
    }
    named = [flag for flag, value in given.items() if value]
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)}: data is taken from one of them; drop the others")
    if flags.split is not None and named and not (flags.data_path or flags.data_args_path):
        raise UserError(
            f"--split {flags.split} divides --data-path, and {named[0]} is divided already; drop it"
        )


def data_prefixes(flags: RunFlags) -> list[str]:
    """Prefixes of every split, without repetition."""
    return list(dict.fromkeys(p for blend in _blends(flags).values() for p in prefixes_of(blend)))


def training_contents(flags: RunFlags) -> dict[str, str]:
    """Prefix -> content of what is trained on, in the blend's order; what is not here left out."""
    if flags.sft_data:
        return _set_contents(flags)
    found = {prefix: content_hash(prefix) for prefix in prefixes_of(_blends(flags)["train"])}
    return {prefix: content for prefix, content in found.items() if content is not None}


def _set_contents(flags: RunFlags) -> dict[str, str]:
    """Directory -> content of fine-tuning's sets, as they are packed and blended.

    Another sequence length or blend is another order, in which counted samples mean nothing.
    """
    manifests = {word: path for word in flags.sft_data if (path := _set_manifest(Path(word)))}
    weights = [word for word in flags.sft_data if word not in manifests]
    packing = [weights, flags.seq_length, flags.context_parallel_size or 1]
    found = {}
    for directory, path in manifests.items():
        try:
            content = json.loads(path.read_text())["source"]["content_sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # whoever opens the set says what is wrong with it
        found[directory] = sha256_of_json([content, packing])
    return found


def _set_manifest(directory: Path) -> Path | None:
    return next((p for name in SET_MANIFESTS if (p := directory / name).is_file()), None)


def check_same_data(load: Path, trained_on: dict[str, str], flags: RunFlags) -> None:
    """Refuse to go on from ``load`` on other data than it counted its samples in.

    Args:
        load: the checkpoint's directory.
        trained_on: ``training_contents`` of the run that wrote it; empty where none is known.
        flags: of the run that is to go on.

    Raises:
        UserError: with both hashes of the first dataset that differs.
    """
    here = training_contents(flags)
    before, now = list(trained_on.items()), list(here.items())
    if not (before and now) or ALLOW_OTHER_DATA in flags:
        return
    if [content for _, content in before] == [content for _, content in now]:
        return  # perhaps in another place
    absent = ("no dataset", "-")
    number = max(len(before), len(now))
    pairs = zip(
        *(side + [absent] * (number - len(side)) for side in (before, now)),
        strict=True,
    )
    (there, old), (prefix, new) = next(pair for pair in pairs if pair[0][1] != pair[1][1])
    raise UserError(
        f"{load} was trained on other data: {there} with content sha256 {old[:SHOWN]}, and here "
        f"is {prefix} with {new[:SHOWN]}. Its count of consumed samples means nothing there: bring "
        f"the data back, start anew with another --save, or add {ALLOW_OTHER_DATA}"
    )


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
    """Refuse datasets that are absent or cut short, and a cache that cannot be written.

    Raises:
        UserError: naming the first.
    """
    if flags.data_cache_path is not None:
        _check_cache(Path(flags.data_cache_path))
    prefixes = data_prefixes(flags)
    if "--synthetic-data" in flags:
        return
    for prefix in prefixes:
        if REMOTE not in prefix:
            check_indexed(Path(prefix))


def _check_cache(directory: Path) -> None:
    there = next(path for path in (directory.absolute(), *directory.absolute().parents)
                 if path.exists())  # fmt: skip
    if not there.is_dir():
        raise UserError(f"--data-cache-path {directory}: {there} is not a directory; name another")
    if not os.access(there, os.W_OK):
        raise UserError(
            f"--data-cache-path {directory}: {there} cannot be written, and Megatron keeps its "
            "sample indices there; name another"
        )
