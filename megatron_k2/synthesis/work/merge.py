"""The shards' records as two files, ordered by content hash: the same bytes whatever made them."""

import contextlib
import heapq
import os
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from megatron_k2.errors import UserError
from megatron_k2.files import commit_file
from megatron_k2.synthesis.llm.ledger import summed
from megatron_k2.synthesis.store import Store, Used
from megatron_k2.synthesis.work.job import (
    FAILED,
    ITEMS_FILE,
    KEPT,
    REJECTED,
    STORE_FILE,
    Job,
    distributed,
    shard_folder,
)

KEPT_FILE, REJECTED_FILE = "kept.jsonl", "rejected.jsonl"


def _stores(folder: Path, job: Job, stack: ExitStack) -> list[Store]:
    """All stores, to read.

    Raises:
        UserError: a shard has none yet.
    """
    found = []
    for shard in range(job.num_shards):
        path = shard_folder(folder, shard) / STORE_FILE
        if not path.is_file():
            raise UserError(f"{folder} has no items yet; run the command that began it")
        store = Store(path, is_reader=True)
        found.append(stack.enter_context(contextlib.closing(store)))
    return found


def counts_of(folder: Path, job: Job) -> Counter[str]:
    """Items by how they ended, ``items`` in all, and ``doubles`` that were left out.

    Raises:
        UserError: items are missing, as where a store was removed.
    """
    found: Counter[str] = Counter()
    with ExitStack() as stack:
        for store in _stores(folder, job, stack):
            found.update(store.counts())
    known = distributed(folder)
    if found["items"] != known["items"]:
        raise UserError(
            f"{folder} holds {found['items']:,} of {known['items']:,} items: a shard's store was "
            f"removed or replaced; remove {ITEMS_FILE} there, and the same command puts them back"
        )
    found["doubles"] = known["doubles"]
    return found


def shards_left(folder: Path, job: Job) -> list[int]:
    """Shards with an item that has not ended for good."""
    with ExitStack() as stack:
        counts = [store.counts() for store in _stores(folder, job, stack)]
    return [
        shard
        for shard, found in enumerate(counts)
        if found.get(KEPT, 0) + found.get(REJECTED, 0) < found["items"]
    ]


def used_of(folder: Path, job: Job) -> dict[str, Used]:
    """Tokens by model."""
    with ExitStack() as stack:
        return summed(store.used() for store in _stores(folder, job, stack))


def first_failure(folder: Path, job: Job) -> str | None:
    """The record of an item that had no answer."""
    with ExitStack() as stack:
        for store in _stores(folder, job, stack):
            for _, record in store.ended(FAILED):
                return record
    return None


def merge(folder: Path, job: Job) -> None:
    """Write ``kept.jsonl`` and ``rejected.jsonl``, each whole or not at all."""
    with ExitStack() as stack:
        stores = _stores(folder, job, stack)
        for state, name in ((KEPT, KEPT_FILE), (REJECTED, REJECTED_FILE)):
            final = folder / name
            temporary = final.with_name(f".{name}.{os.getpid()}.partial")
            with temporary.open("w", encoding="utf-8") as out:
                for _, record in heapq.merge(*(store.ended(state) for store in stores)):
                    out.write(record + "\n")
            commit_file(temporary, final)
