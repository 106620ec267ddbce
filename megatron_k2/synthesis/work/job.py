"""A job: a task by name with its settings, and its items over shards by content hash.

The folder holds ``job.json``, a folder a shard with its store, and, once every item has ended,
``kept.jsonl`` and ``rejected.jsonl``.
"""

import contextlib
import hashlib
import importlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

from megatron_k2.errors import UserError
from megatron_k2.files import write_atomically
from megatron_k2.synthesis.store import Item, Store

JOB_FILE, ITEMS_FILE = "job.json", "items.json"
STORE_FILE, PROGRESS_FILE = "work.sqlite", "progress.json"
KEPT, REJECTED, FAILED = "kept", "rejected", "failed"
"""How an item ends. A failed one had no answer and is worked on again by the next run."""
MOST_SHARDS = 1000


class Outcome(NamedTuple):
    """What became of an item."""

    is_kept: bool
    record: dict[str, Any]
    """Its line; of a rejected one with ``stage`` and ``reason``. Nothing in it may hang on when or
    where it was made."""


class Task(Protocol):
    """What is done with each item."""

    def sources(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """A source's id and an item's payload, in an order that is always the same."""
        ...

    async def open(self, store: Store, concurrency: int) -> None:
        """Connect to models, whose answers ``store`` keeps."""
        ...

    async def work(self, item: Item) -> Outcome:
        """One item.

        Raises:
            StoppingError: it was not finished, since the work stops.
            EngineError: a model does not answer.
            RefusedError: an endpoint refuses a request.
        """
        ...

    def stop(self) -> None:
        """Ask nothing new."""
        ...

    async def close(self) -> None:
        """Close connections."""
        ...


@dataclass(frozen=True)
class Job:
    """What ``job.json`` says.

    Raises:
        UserError: a number of shards that is not 1 to ``MOST_SHARDS``.
    """

    task: str
    """``module:name`` of what makes a ``Task`` of settings and options."""
    settings: dict[str, Any]
    """JSON; all that the output hangs on, and no key."""
    num_shards: int
    options: dict[str, Any] = field(default_factory=dict)
    """What may be another from run to run, as where the endpoints are."""
    schema_version: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.num_shards <= MOST_SHARDS:
            raise UserError(f"{self.num_shards} shards: expected 1 to {MOST_SHARDS}")

    def made_task(self) -> Task:
        """The task."""
        module, _, name = self.task.partition(":")
        return cast(
            Task, getattr(importlib.import_module(module), name)(self.settings, self.options)
        )


def item_of(source: str, payload: dict[str, Any]) -> Item:
    """An item, named by its content."""
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"))
    return Item(hashlib.sha256(text.encode()).digest(), source, payload)


def shard_of(name: bytes, num_shards: int) -> int:
    """Where an item of this hash is."""
    return int.from_bytes(name[:8]) % num_shards


def shard_folder(folder: Path, shard: int) -> Path:
    """Of a shard."""
    return folder / "shards" / f"{shard:04d}"


def read_job(folder: Path) -> Job:
    """The job of a folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = folder / JOB_FILE
    try:
        return Job(**json.loads(path.read_bytes()))
    except OSError:
        raise UserError(f"{folder} has no {JOB_FILE}; expected the --output of a run") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def begin(folder: Path, job: Job) -> None:
    """Make the folder, or recognise the same job in it.

    Raises:
        UserError: it was begun with other settings; names the first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(job), indent=1, ensure_ascii=False)
    if not (folder / JOB_FILE).exists():
        write_atomically(folder / JOB_FILE, text.encode())
        return
    before = read_job(folder)
    now = {**job.settings, "shards": job.num_shards, "task": job.task}
    old = {**before.settings, "shards": before.num_shards, "task": before.task}
    for name in sorted(now.keys() | old.keys()):
        if now.get(name) != old.get(name):
            raise UserError(
                f"{folder} was begun with {name} {str(old.get(name))[:80]!r}, now "
                f"{str(now.get(name))[:80]!r}; give the same, or another --output"
            )
    if job.options != before.options:
        write_atomically(folder / JOB_FILE, text.encode())


def distribute(folder: Path, job: Job, task: Task) -> None:
    """Put every item into its shard's store; done before, nothing happens.

    Of sources with the same content the first is kept; ``items.json`` says how many went.

    Raises:
        UserError: a source cannot be read, or the disk is full; the next run begins this again.
    """
    if (folder / ITEMS_FILE).is_file():
        return
    num_items = num_doubles = 0
    with ExitStack() as stack:
        stores = []
        for shard in range(job.num_shards):
            place = shard_folder(folder, shard)
            place.mkdir(parents=True, exist_ok=True)
            store = stack.enter_context(contextlib.closing(Store(place / STORE_FILE)))
            store.clear_items()
            stores.append(store)
        for source, payload in task.sources():
            item = item_of(source, payload)
            is_new = stores[shard_of(item.hash, job.num_shards)].add_item(item)
            num_items += is_new
            num_doubles += not is_new
    record = {"items": num_items, "doubles": num_doubles}
    write_atomically(folder / ITEMS_FILE, json.dumps(record).encode())


def distributed(folder: Path) -> dict[str, int]:
    """How many ``items`` there are, and how many ``doubles`` were left out."""
    found: dict[str, int] = json.loads((folder / ITEMS_FILE).read_bytes())
    return found
