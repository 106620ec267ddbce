"""``Store``: one shard's SQLite file with its items, what models answered, and how items ended.

One writer, which holds the file alone: a write-ahead log then needs no shared memory and lies on
shared file systems too. Everything goes through one connection in order, so an answer is committed
with or before the item that was made of it; a kill loses what was put since the last commit, at
most ``BATCH`` answers, and never a part of a line.
"""

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_k2.errors import UserError

BATCH = 64
"""Answers or ended items after which is committed."""
COMMIT_SECONDS = 0.2
"""Time after which is committed, where something is put or ``tick`` is called."""
PAGE = 512
"""Items that are read at one time."""
_SCHEMA = """
create table if not exists item(
    hash blob primary key, source text not null, payload text not null) without rowid;
create table if not exists answer(
    key blob primary key, value text not null, model text not null,
    prompt_tokens integer not null, completion_tokens integer not null) without rowid;
create table if not exists ended(
    hash blob primary key, state text not null, record text not null) without rowid;
"""


class Item(NamedTuple):
    """One unit of work."""

    hash: bytes
    """sha256 of its payload: its name, its shard and its place in the output."""
    source: str
    payload: dict[str, Any]


class Used(NamedTuple):
    """Tokens that a model's distinct requests took; what was asked twice is not seen."""

    num_requests: int
    prompt_tokens: int
    completion_tokens: int


class Store:
    """The file.

    Args:
        path: of it; made where absent.
        is_reader: nothing is written; the file may be another process's.

    Raises:
        UserError: the file is no such store, or cannot be opened.
    """

    def __init__(self, path: Path, *, is_reader: bool = False) -> None:
        self.path = path
        self._num_pending, self._committed_at = 0, time.monotonic()
        try:
            name = f"file:{path}?mode=ro" if is_reader else str(path)
            self._db = sqlite3.connect(name, isolation_level=None, uri=is_reader)
            if not is_reader:
                self._db.execute("pragma locking_mode=exclusive")
                self._db.execute("pragma journal_mode=wal")
                self._db.execute("pragma synchronous=normal")
                self._db.executescript(_SCHEMA)
            self._db.execute("select 1 from ended limit 1").fetchone()
        except sqlite3.Error as error:
            if "locked" in str(error):
                raise UserError(f"{path} is being worked on; wait until that has ended") from None
            raise UserError(f"{path}: {error}; expected a shard's store") from None

    def clear_items(self) -> None:
        """Forget the items of a distribution that was broken off; answers stay."""
        self._write("delete from item", ())
        self.commit()

    def answer(self, key: bytes) -> Any | None:
        """What was answered to the request of this key."""
        row = self._db.execute("select value from answer where key=?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def keep_answer(self, key: bytes, value: Any, model: str, used: tuple[int, int]) -> None:
        """Keep an answer and its tokens, of the prompt and of the completion."""
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        self._write("insert or replace into answer values(?,?,?,?,?)", (key, text, model, *used))

    def used(self) -> dict[str, Used]:
        """By model."""
        rows = self._db.execute(
            "select model, count(*), sum(prompt_tokens), sum(completion_tokens) from answer "
            "group by model"
        )
        return {str(model): Used(*numbers) for model, *numbers in rows}

    def add_item(self, item: Item) -> bool:
        """Add it; False where one of the same content is there, which stays."""
        text = json.dumps(item.payload, ensure_ascii=False, separators=(",", ":"))
        row = (item.hash, item.source, text)
        return self._write("insert or ignore into item values(?,?,?)", row) > 0

    def items(self) -> Iterator[Item]:
        """Every item, by its hash."""
        for name, source, payload in self._db.execute(
            "select hash, source, payload from item order by hash"
        ):
            yield Item(name, source, json.loads(payload))

    def item(self, name: bytes) -> Item | None:
        """The one of this hash."""
        row = self._db.execute(
            "select source, payload from item where hash = ?", (name,)
        ).fetchone()
        return None if row is None else Item(name, row[0], json.loads(row[1]))

    def items_left(self) -> Iterator[Item]:
        """Items that have not ended, by their hash; those that end meanwhile may be left out."""
        last = b""
        while True:
            rows = self._db.execute(
                "select hash, source, payload from item where hash > ? and not exists "
                f"(select 1 from ended where ended.hash = item.hash) order by hash limit {PAGE}",
                (last,),
            ).fetchall()
            if not rows:
                return
            for name, source, payload in rows:
                yield Item(name, source, json.loads(payload))
            last = rows[-1][0]

    def end_item(self, name: bytes, state: str, record: dict[str, Any]) -> None:
        """How an item ended; its record is JSON."""
        text = json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        self._write("insert or replace into ended values(?,?,?)", (name, state, text))

    def forget_ended(self, state: str) -> None:
        """Items that ended so are to be worked on again."""
        self._write("delete from ended where state=?", (state,))
        self.commit()

    def ended(self, *states: str) -> Iterator[tuple[bytes, str]]:
        """Hash and record's text of items that ended so, by their hash."""
        marks = ",".join("?" * len(states))
        rows = self._db.execute(
            f"select hash, record from ended where state in ({marks}) order by hash", states
        )
        yield from rows

    def counts(self) -> dict[str, int]:
        """Ended items by state, and ``items`` in all."""
        found = dict(self._db.execute("select state, count(*) from ended group by state"))
        found["items"] = self._db.execute("select count(*) from item").fetchone()[0]
        return found

    def _write(self, statement: str, values: tuple[Any, ...]) -> int:
        with self._told():
            if not self._num_pending:
                self._db.execute("begin")
            self._num_pending += 1
            changed = self._db.execute(statement, values).rowcount
        if self._num_pending >= BATCH:
            self.commit()
        else:
            self.tick()
        return changed

    def tick(self) -> None:
        """Commit what has waited long enough."""
        if self._num_pending and time.monotonic() - self._committed_at > COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Make everything put so far survive this process."""
        if self._num_pending:
            with self._told():
                self._db.execute("commit")
        self._num_pending, self._committed_at = 0, time.monotonic()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """A full disk as a sentence; the transaction is taken back."""
        try:
            yield
        except sqlite3.Error as error:
            self._num_pending = 0
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("rollback")
            raise UserError(
                f"{self.path}: {error}; what was committed is kept, so make room and run the same "
                "command again"
            ) from None

    def close(self) -> None:
        """Commit, and let go of the file."""
        try:
            self.commit()
        finally:
            self._db.close()
