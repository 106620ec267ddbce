"""``RemoteEngine``: servers elsewhere, behind the engine's protocol.

Prompts and answers are token ids, through ``/v1/completions`` as vLLM and our own server speak it.
An answer comes as one output: what was cut can then be asked for again. New weights go through
vLLM's verbs as files (``engine/transfer/bucket_files.py``), to every endpoint or, as far as anybody
is served, to none: one that failed answers nothing until a round succeeds.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from functools import partial
from typing import Any, Self

from torch import Tensor

from megatron_k2.engine.protocol import (
    EngineError,
    Health,
    Limits,
    Output,
    PauseMode,
    Request,
    UpdateCode,
    UpdateError,
    check_request,
)
from megatron_k2.engine.remote.answers import body_of, output_of, tagged
from megatron_k2.engine.remote.client import Client
from megatron_k2.engine.remote.endpoints import Endpoint, Policy
from megatron_k2.engine.remote.rounds import FileRound, all_of, in_files
from megatron_k2.engine.transfer.bucket_files import BucketFolder
from megatron_k2.engine.transfer.buckets import BUCKET_BYTES, buckets_of
from megatron_k2.engine.transfer.manifest import Manifest
from megatron_k2.errors import UserError


class RemoteEngine:
    """Servers of one model.

    Args:
        client: of their endpoints; the engine's from here on.
        limits: of the smallest of them.
        model: what they call it; ``None``: whatever they serve.
        bucket_bytes: of new weights, a file.
        version: of the weights that they hold, for tokens of a server that does not say it (vLLM).
    """

    def __init__(
        self,
        client: Client,
        limits: Limits,
        model: str | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        version: str = "",
    ) -> None:
        self._client, self.limits, self._model = client, limits, model
        self._bucket_bytes = bucket_bytes
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        self._is_paused = False
        self._fault, self._version = "", version

    @classmethod
    async def connect(
        cls,
        endpoints: Sequence[Endpoint],
        *,
        vocab_size: int,
        policy: Policy | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        version: str = "",
    ) -> Self:
        """Ask every endpoint what it serves.

        Args:
            endpoints: servers of the same model.
            vocab_size: ids of its tokenizer, which the API does not tell.
            policy: of the client.
            bucket_bytes: of new weights, a file.
            version: see the class.

        Raises:
            UserError: an endpoint or its key is wrong.
            EngineError: one does not answer.
        """
        client = Client(endpoints, policy)
        try:
            states = client.endpoints.states
            answers = [await client.once(state, "GET", "/v1/models") for state in states]
            models = [answer["data"][0] for answer in answers]
            length = min(int(model["max_model_len"]) for model in models)
            limits = Limits(vocab_size, length, client.policy.concurrency)
            return cls(client, limits, str(models[0]["id"]), bucket_bytes, version)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            await client.close()
            raise EngineError(f"/v1/models is not as vLLM's: {error!r}") from None
        except BaseException:
            await client.close()
            raise

    def check_grammar(self, grammar: str) -> None:
        """See the protocol: none."""
        raise UserError(
            "a grammar is not sent to an engine behind HTTP; hold the answer to a schema by the "
            "server's own tools or response_format, or generate with an engine of this process"
        )

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """See the protocol; the answer comes at once.

        Raises:
            UserError: also of a request with a grammar, which is not sent.
        """
        check_request(request, self.limits)
        if request.grammar is not None:
            self.check_grammar(request.grammar)
        if request.id in self._tasks:
            raise UserError(f"request id {request.id!r} is in flight already")
        if self._fault:
            raise EngineError(self._fault)
        body, version = body_of(request, self._model), self._version
        task = self._tasks[request.id] = asyncio.create_task(
            self._client.post("/v1/completions", body)
        )
        try:
            answer = await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():  # not ``abort``: whoever asked has gone
                raise
            yield Output(finish_reason="abort")
            return
        finally:
            self._tasks.pop(request.id, None)
            task.cancel()
        is_same = version == self._version
        yield tagged(output_of(answer, request), version if is_same else "")

    async def abort(self, ids: Iterable[str] | None = None) -> None:
        """See the protocol; of this engine's own requests."""
        wanted = list(self._tasks) if ids is None else ids
        for task in [self._tasks[name] for name in wanted if name in self._tasks]:
            task.cancel()

    async def pause(self, mode: PauseMode = "abort") -> None:
        """See the protocol."""
        await self._everywhere("POST", f"/pause?mode={mode}")
        self._is_paused = True

    async def resume(self) -> None:
        """See the protocol."""
        await self._everywhere("POST", "/resume")
        self._is_paused = False

    async def _everywhere(self, method: str, path: str, body: Any = None) -> list[Any]:
        """One attempt at every endpoint; the first that fails is the error."""
        states = self._client.endpoints.states
        return await all_of(self._client.once(state, method, path, body) for state in states)

    async def update_weights(
        self,
        weights: Iterable[tuple[str, Tensor]],
        version: str,
        manifest: Callable[[], Manifest] | None = None,
    ) -> None:
        """See the protocol; ``weights`` is drawn on a thread. A manifest is needed.

        Raises:
            UserError: there is no manifest; nothing has been sent then.
        """
        if manifest is None:
            raise UserError("remote engines take weights with a manifest of them alone")
        self._fault = f"weights {version!r} are half in"
        try:
            await self._update(weights, version, manifest)
        except BaseException as error:
            self._fault = f"the update to weights {version!r} failed: {error}"
            if isinstance(error, UpdateError) or not isinstance(error, EngineError):
                raise
            raise UpdateError(UpdateCode.ENGINE, self._fault) from error
        self._fault, self._version = "", version

    async def _update(
        self, weights: Iterable[tuple[str, Tensor]], version: str, manifest: Callable[[], Manifest]
    ) -> None:
        states = self._client.endpoints.states
        rounds = [FileRound(self._client, state, version) for state in states]
        await all_of(each.begin() for each in rounds)
        buckets = buckets_of(weights, self._bucket_bytes)
        while (bucket := await asyncio.to_thread(next, buckets, None)) is not None:
            async with in_files(rounds, partial(BucketFolder.write, bucket=bucket)) as names:
                await all_of(each.give(names[each]) for each in rounds)
        sent = manifest()
        async with in_files(rounds, partial(BucketFolder.write_manifest, manifest=sent)) as names:
            await all_of(each.end(names[each]) for each in rounds)

    def health(self) -> Health:
        """See the protocol: as the last requests found them."""
        now = time.monotonic()
        is_awake = self._client.endpoints.is_awake(now)
        why = "; ".join(s.why for s in self._client.endpoints.states if s.why)
        return Health(
            is_awake and not self._fault,
            self._fault or ("" if is_awake else why),
            self._is_paused,
            self._version,
            len(self._tasks),
            0,
        )

    async def close(self) -> None:
        """See the protocol."""
        await self.abort()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await self._client.close()
