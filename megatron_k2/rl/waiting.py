"""Ranks wait for rank 0 on the store they met in, never inside a collective.

A rollout takes as long as it takes; a collective that waits so long is killed by NCCL's watchdog.
While rank 0 works at something that the others need, each rank counts a beat up in the store, on a
thread with a connection of its own. Rank 0 looks at all beats, the others at rank 0's: who stands
still for ``SILENT_SECONDS`` (killed, stopped, off the network) is named by rank 0, and all end.
Where the store itself gives no answer, as when rank 0's process holds it and is stopped, each rank
finds that out by its own clock.
"""

import asyncio
import contextlib
import functools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import torch.distributed as dist

from megatron_k2.errors import UserError

BEAT_SECONDS = 1.0
SILENT_SECONDS = 20.0
"""Ours: longer than a busy node delays a thread, far below the ten minutes of a watchdog."""
EXIT_CODE = 75
"""Of the ranks that are left: sysexits.h's "try again later"; a new start resumes."""
_FIRST_PAUSE_SECONDS, _MOST_PAUSE_SECONDS = 0.02, 0.5
_SHARE_OF_WAIT = 0.01
"""A rank looks for the end after a hundredth of what it has waited: early for short waits, and a
thousand ranks ask a store a few thousand times a second at most."""
_HEARD_SECONDS = 3.0
"""For the others to read why all end: a few looks."""
_MOST_NAMED = 4
_PREFIX = "megatron_k2/waiting"
_STORE = "the store in which the ranks meet, on rank 0's host,"


class LostError(RuntimeError):
    """Somebody that the run cannot go on without has gone; the message names it."""


class EndAsked(Exception):  # noqa: N818 - no error: a signal, before the time limit or preemption
    """The run is to end now, on every rank alike; what was begun is left as it is."""


class _Word(NamedTuple):
    """How a wait ended."""

    kind: Literal["done", "end", "lost", "refused"]
    detail: str = ""


class Waiting:
    """One rank's part.

    Args:
        store: of all ranks; a connection of its own is opened to it.
        rank: of this process.
        size: ranks.
        must_end: whether this rank was asked to end the run; called from a thread.
        beat_seconds: between two beats.
        silent_seconds: without a beat, after which a rank is lost.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        *,
        must_end: Callable[[], bool] = lambda: False,
        beat_seconds: float = BEAT_SECONDS,
        silent_seconds: float = SILENT_SECONDS,
    ) -> None:
        self.store = dist.PrefixStore(_PREFIX, store.clone())
        self.store.set_timeout(timedelta(seconds=silent_seconds))
        self.rank, self.others = rank, range(1, size) if rank == 0 else range(1)
        self.must_end = must_end
        self.beat_seconds, self.silent_seconds = beat_seconds, silent_seconds
        self._number = 0
        self.store.set(f"where/{rank}", f"host {socket.gethostname()}, pid {os.getpid()}")

    async def through[T](self, what: str, work: Coroutine[Any, Any, T] | None) -> T | None:
        """Rank 0 does ``work``; the others return when it is done. Collective.

        Args:
            what: is waited for, in words.
            work: on rank 0; ``None`` elsewhere.

        Returns:
            Rank 0's result there, ``None`` elsewhere.

        Raises:
            LostError: a rank has gone, or rank 0's work failed, which there is its own error.
            UserError: that is what rank 0's work raised.
            EndAsked: a rank was asked to end.
        """
        self._number += 1
        turn = _Turn(self, f"over/{self._number}", what)
        if work is None:
            await turn.ended()
            return None
        doing, ended = asyncio.create_task(work), asyncio.create_task(turn.ended())
        try:
            await asyncio.wait({doing, ended}, return_when=asyncio.FIRST_COMPLETED)
            word = turn.tell(_word_of(doing)) if doing.done() else turn.found()
            # what comes next is a collective, or the end of this process and of the store with it
            is_done = word.kind == "done"
            late = await turn.unheard(self.silent_seconds if is_done else _HEARD_SECONDS)
            if is_done:
                word = turn.go(late)
            if not doing.done() or doing.exception() is None:
                turn.end(word)
            return doing.result()
        finally:
            turn.is_over = True
            doing.cancel()
            ended.cancel()
            await asyncio.gather(doing, ended, return_exceptions=True)


def _word_of(doing: "asyncio.Task[Any]") -> _Word:
    error = doing.exception()
    if error is None:
        return _Word("done")
    if isinstance(error, UserError):
        return _Word("refused", str(error))
    return _Word("lost", f"rank 0 failed: {error}")


def waiting_of_ranks(must_end: Callable[[], bool]) -> Waiting:
    """Of this rank, among all that ``torch.distributed`` has started.

    Args:
        must_end: see ``Waiting``.
    """
    store = dist.distributed_c10d._get_default_store()
    return Waiting(store, dist.get_rank(), dist.get_world_size(), must_end=must_end)


def end_within(seconds: float = 5.0) -> None:
    """End this process whatever it hangs in: communicators wait for ranks that have gone."""
    timer = threading.Timer(seconds, os._exit, (EXIT_CODE,))
    timer.daemon = True
    timer.start()


class _Turn:
    """One wait, as one rank sees it."""

    def __init__(self, owner: Waiting, key: str, what: str) -> None:
        self._owner, self._key, self._what = owner, key, what
        self.word: _Word | None = None
        """How it ended."""
        self._began = self._alive = time.monotonic()
        self._seen: dict[int, tuple[int, float]] = {}
        self.is_over = False
        loop, self._woken = asyncio.get_running_loop(), asyncio.Event()
        self._wake = functools.partial(loop.call_soon_threadsafe, self._woken.set)
        threading.Thread(target=self._watch, name=f"waits for {what}", daemon=True).start()

    async def ended(self) -> None:
        """Until rank 0 says so.

        Raises:
            LostError, UserError, EndAsked: as ``Waiting.through``.
        """
        silent = self._owner.silent_seconds
        while self.word is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), self._owner.beat_seconds)
            if self.word is None and time.monotonic() - self._alive > silent:
                self.word = _Word("lost", f"{_STORE} has not answered for {silent:g} s")
        self.end(self.word)

    def found(self) -> _Word:
        """How it ended, of a wait that has."""
        assert self.word is not None
        return self.word

    def end(self, word: _Word) -> None:
        """As the word says: by an exception, unless all is done."""
        match word.kind:
            case "end":
                raise EndAsked
            case "refused":
                raise UserError(word.detail)
            case "lost":
                raise LostError(f"waiting for {self._what}: {word.detail}")

    def tell(self, word: _Word) -> _Word:
        """The others, if they can still be told; the first word stands, and is returned."""
        return self._told(self._key, word)

    def go(self, late: Sequence[int]) -> _Word:
        """All may go on, or none because of some; those that have read "done" wait for it."""
        word = _Word("lost", self.silence(late)) if late else _Word("done")
        return self._told(f"{self._key}/go", word)

    def _told(self, key: str, word: _Word) -> _Word:
        with contextlib.suppress(RuntimeError):
            stands = self._owner.store.compare_set(key, "", json.dumps(word))
            return _Word(*json.loads(stands))
        return word

    async def unheard(self, seconds: float) -> list[int]:
        """Ranks that have not read the word after so long; none, as soon as all have."""
        store, end = self._owner.store, time.monotonic() + seconds
        late = list(self._owner.others)
        with contextlib.suppress(RuntimeError):
            while late and time.monotonic() < end:
                if store.add(f"{self._key}/heard", 0) == len(self._owner.others):
                    return []
                await asyncio.sleep(_FIRST_PAUSE_SECONDS)
            late = [rank for rank in late if not store.check([f"{self._key}/heard/{rank}"])]
        return late

    def _watch(self) -> None:
        """The thread."""
        try:
            word = self._looked()
        except RuntimeError as error:  # torch's DistError among them
            word = _Word("lost", f"{_STORE} has gone ({str(error).partition(chr(10))[0][:160]})")
        self.word = self.word or word
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._wake()

    def _looked(self) -> _Word | None:
        """Beats and looks until it is over."""
        store, next_beat, has_heard = self._owner.store, self._began, False
        while not self.is_over:
            now = self._alive = time.monotonic()
            key = f"{self._key}/go" if has_heard else self._key
            if self._owner.rank and store.check([key]):
                said = _Word(*json.loads(store.get(key)))
                if not has_heard:
                    store.set(f"{self._key}/heard/{self._owner.rank}", "")
                    store.add(f"{self._key}/heard", 1)
                if has_heard or said.kind != "done":
                    return said
                self._began, has_heard = now, True
            if now >= next_beat:
                next_beat = now + self._owner.beat_seconds
                if (word := self._beat()) is not None:
                    return word
            share = _SHARE_OF_WAIT * (now - self._began)
            time.sleep(min(max(share, _FIRST_PAUSE_SECONDS), _MOST_PAUSE_SECONDS))
        return None

    def _beat(self) -> _Word | None:
        """Give a sign of life and look for the others'; a word where it is over."""
        owner = self._owner
        owner.store.add(f"beat/{owner.rank}", 1)
        if owner.must_end():
            owner.store.add("end", 1)
        is_root = owner.rank == 0
        if is_root and owner.store.add("end", 0):
            return self.tell(_Word("end"))
        if not (silent := [rank for rank in owner.others if self._is_silent(rank)]):
            return None
        word = _Word("lost", self.silence(silent))
        return self.tell(word) if is_root else word

    def silence(self, silent: Sequence[int]) -> str:
        """A sentence with the names of those that are silent."""
        named = ", ".join(f"rank {rank} ({self._where(rank)})" for rank in silent[:_MOST_NAMED])
        more = f" and {len(silent) - _MOST_NAMED} more" if len(silent) > _MOST_NAMED else ""
        return f"no sign of life from {named}{more} for {self._owner.silent_seconds:g} s"

    def _is_silent(self, rank: int) -> bool:
        count, now = self._owner.store.add(f"beat/{rank}", 0), time.monotonic()
        before = self._seen.setdefault(rank, (count, now))
        if before[0] != count:
            self._seen[rank] = (count, now)
        return now - self._seen[rank][1] > self._owner.silent_seconds

    def _where(self, rank: int) -> str:
        key = f"where/{rank}"
        return self._owner.store.get(key).decode() if self._owner.store.check([key]) else "unknown"
