"""``PoolEngine``: several processes behind one engine, their weights in files that all of them map.

One thread a process, one process a core: small products do not gain from threads, separate batches
do. A request goes where fewest are in flight. Rows are shared between prompts within a process
only. A process that dies takes its own requests with it, by an error; it is not started again.
"""

import asyncio
import itertools
import multiprocessing
import shutil
import tempfile
import threading
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from megatron_k2.data.tokenizer import Tokenizer
from megatron_k2.engine.local import worker
from megatron_k2.engine.local.core import NO_GRAMMARS, STEP_TOKENS, require_room
from megatron_k2.engine.local.core_thread import UNGIVEN, code_of
from megatron_k2.engine.local.invariant import whole_tiles
from megatron_k2.engine.local.member import Member
from megatron_k2.engine.local.opened import grammars_of, model_for
from megatron_k2.engine.local.weights import Weights
from megatron_k2.engine.protocol import (
    NO_WEIGHTS,
    EngineError,
    Health,
    Limits,
    Output,
    PauseMode,
    Request,
    UpdateError,
    check_request,
)
from megatron_k2.engine.transfer.manifest import Manifest
from megatron_k2.errors import UserError


class PoolEngine:
    """See the module.

    Args:
        weights: in files, loaded unless the share's version is ``NO_WEIGHTS``; the pool's.
        share: what each process computes with.
        folder: of the files.
        num_processes: of them.
    """

    def __init__(
        self, weights: Weights, share: worker.Share, folder: Path, num_processes: int
    ) -> None:
        self._weights, self._version, self._grammars = weights, share.version, share.grammars
        self.limits = Limits(
            share.preset.vocab_size, share.max_length, share.num_slots * num_processes
        )
        self._numbers = itertools.count()
        self._is_paused = self._is_closed = False
        self._fault = UNGIVEN if share.version == NO_WEIGHTS else ""
        self._members = [self._started(number, share, folder) for number in range(num_processes)]
        for member in self._members:
            self._await_ready(member)

    @classmethod
    def from_directory(
        cls,
        folder: Path,
        *,
        num_processes: int,
        num_slots: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        version: str = "0",
        step_tokens: int = STEP_TOKENS,
        memory_bytes: int | None = None,
        is_batch_invariant: bool = False,
        tokenizer: Callable[[], Tokenizer] | None = None,
    ) -> Self:
        """Serve a run or a Hugging Face directory; the processes share ``num_slots`` out.

        ``tokenizer`` is pickled; what else may be given is ``opened.core_of``'s. Of the
        ``version`` ``NO_WEIGHTS`` nothing but ``config.json`` is read.

        Raises:
            UserError: see ``opened.core_of``; or a process does not start.
        """
        _require_slots(num_processes, num_slots)
        is_read = version != NO_WEIGHTS
        model = model_for(folder, max_length, is_read=is_read)
        share = worker.Share(
            model.preset,
            dtype,
            num_slots,
            max_length,
            version,
            model.expert_groups,
            step_tokens,
            is_batch_invariant,
            grammars_of(model, tokenizer),
        )
        return cls.over(share, model.tensors() if is_read else None, num_processes, memory_bytes)

    @classmethod
    def over(
        cls,
        share: worker.Share,
        tensors: Iterable[tuple[str, Tensor]] | None,
        num_processes: int,
        memory_bytes: int | None = None,
    ) -> Self:
        """The same of a model whose shape is known.

        Args:
            share: what the processes compute with; they share its slots out.
            tensors: its weights; ``None``: they are given later.
            num_processes: of them.
            memory_bytes: that weights and slots may take.

        Raises:
            UserError: no room for it, or a process does not start.
        """
        _require_slots(num_processes, share.num_slots)
        share = replace(share, num_slots=-(-share.num_slots // num_processes))
        files = Path(tempfile.mkdtemp(prefix="megatron-k2-weights-"))
        try:
            weights = share.weights(files)
            length = whole_tiles(share.max_length) if share.is_batch_invariant else share.max_length
            require_room(weights, share.num_slots * num_processes, length, memory_bytes)
            if tensors is not None:
                weights.load(tensors)
            return cls(weights, share, files, num_processes)
        finally:
            shutil.rmtree(files)  # mapped by all who need them; nothing is left behind

    def _started(self, number: int, share: worker.Share, folder: Path) -> Member:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=worker.main, args=(theirs, share, folder), daemon=True)
        process.start()
        theirs.close()
        return Member(number, process, ours)

    def _await_ready(self, member: Member) -> None:
        try:
            member.connection.recv()
        except EOFError:
            self._terminate()
            raise UserError(
                f"process {member.number} of the engine did not start; the reason stands above"
            ) from None
        threading.Thread(target=self._read, args=(member,), daemon=True).start()

    def check_grammar(self, grammar: str) -> None:
        """See the protocol; a process compiles what it is asked for once more."""
        if self._grammars is None:
            raise UserError(NO_GRAMMARS)
        self._grammars.compiled(grammar)

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """See the protocol."""
        check_request(request, self.limits)
        if any(request.id in member.streams for member in self._members):
            raise UserError(f"request id {request.id!r} is in flight already")
        member = self._chosen()
        stream = member.streams[request.id] = asyncio.Queue()
        is_ended = False
        try:
            member.send("generate", request)
            while not is_ended:
                output = await stream.get()
                if isinstance(output, Exception):
                    is_ended = True
                    raise output
                is_ended = output.finish_reason is not None
                yield output
        finally:
            member.streams.pop(request.id, None)
            if not is_ended:
                member.send("leave", request.id)

    def _chosen(self) -> Member:
        """The process with fewest requests."""
        living = self._living()
        if self._fault or not living:
            raise EngineError(self._fault or self.health().detail)
        found = min(living, key=lambda member: len(member.streams))
        found.loop = asyncio.get_running_loop()
        return found

    def _living(self) -> list[Member]:
        return [member for member in self._members if member.is_alive]

    async def _all(self, method: str, *arguments: Any) -> list[Any]:
        """A verb of every living process; one that dies meanwhile is passed over."""
        futures = []
        for member in self._living():
            member.loop = asyncio.get_running_loop()
            number = next(self._numbers)
            future = member.calls[number] = member.loop.create_future()
            member.send("call", number, method, arguments)
            futures.append(future)
        return list(await asyncio.gather(*futures))

    async def abort(self, ids: Iterable[str] | None = None) -> None:
        """See the protocol."""
        await self._all("abort", None if ids is None else list(ids))

    async def pause(self, mode: PauseMode = "abort") -> None:
        """See the protocol."""
        if mode not in ("abort", "wait", "keep"):
            raise UserError(f"pause mode {mode!r}: abort, wait or keep")
        await self._all("pause", mode)
        self._is_paused = True

    async def resume(self) -> None:
        """See the protocol."""
        self._is_paused = False
        await self._all("resume")

    async def update_weights(
        self,
        weights: Iterable[tuple[str, Tensor]],
        version: str,
        manifest: Callable[[], Manifest] | None = None,
    ) -> None:
        """See the protocol; nobody computes while the files are written."""
        await self._all("pause", "keep")
        self._fault = f"weights {version!r} are half in"
        try:
            await asyncio.to_thread(self._weights.load, weights)
            if manifest is not None:
                manifest().require_held(self._weights.held, version)
        except Exception as error:
            self._fault = f"the update to weights {version!r} failed: {error}"
            for member in self._living():
                self._fail(member, EngineError(self._fault))
            await self._all("abort", None)
            raise UpdateError(code_of(error), self._fault) from error
        await self._all("adopt", version)
        self._version, self._fault = version, ""
        if not self._is_paused:
            await self._all("resume")

    async def cpu_seconds(self) -> list[float]:
        """That each living process has taken so far."""
        return await self._all("cpu_seconds")

    def health(self) -> Health:
        """See the protocol; a dead process is named, the others answer on."""
        counts = [len(member.streams) for member in self._living()]
        each = self.limits.num_slots // len(self._members)
        dead = [str(m.number) for m in self._members if not m.is_alive and not self._is_closed]
        told = f"process {', '.join(dead)} of {len(self._members)} died" if dead else ""
        running = sum(min(count, each) for count in counts)
        is_ready = bool(counts) and not self._fault and not self._is_closed
        detail = self._fault or ("closed" if self._is_closed else told)
        paused, waiting = self._is_paused, sum(counts) - running
        return Health(is_ready, detail, paused, self._version, running, waiting)

    async def close(self) -> None:
        """See the protocol."""
        self._is_closed = True
        for member in self._members:
            self._fail(member, EngineError("the engine was closed"))
        await asyncio.to_thread(self._terminate)

    def _terminate(self) -> None:
        for member in self._members:
            member.process.terminate()
        for member in self._members:
            member.process.join()

    def _fail(self, member: Member, error: EngineError) -> None:
        for stream in member.streams.values():
            stream.put_nowait(error)

    # What follows runs on a thread of its own for each process, but for what it hands to the loop.

    def _read(self, member: Member) -> None:
        try:
            while True:
                messages = member.connection.recv()
                assert member.loop is not None  # it was asked for something
                member.loop.call_soon_threadsafe(self._take, member, messages)
        except (EOFError, OSError):
            member.is_alive = False
            if member.loop is not None and not member.loop.is_closed():
                member.loop.call_soon_threadsafe(self._bury, member)

    def _take(self, member: Member, messages: tuple[tuple[Any, ...], ...]) -> None:
        for message in messages:
            match message:
                case ("output", name, found):
                    if (stream := member.streams.get(name)) is not None:
                        stream.put_nowait(found)
                case ("done", number, found, error):
                    future = member.calls.pop(number)
                    if future.done():
                        continue  # whoever asked has gone
                    if error is None:
                        future.set_result(found)
                    else:
                        future.set_exception(error)

    def _bury(self, member: Member) -> None:
        """Tell those who wait for a process that has died."""
        member.process.join()
        code = member.process.exitcode
        self._fail(member, EngineError(f"process {member.number} of the engine died ({code})"))
        for future in member.calls.values():
            if not future.done():
                future.set_result(None)
        member.calls.clear()


def _require_slots(num_processes: int, num_slots: int) -> None:
    if not 1 <= num_processes <= num_slots:
        raise UserError(f"{num_processes} processes for {num_slots} slots: 1 to {num_slots}")
