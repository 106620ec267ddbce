"""An engine without a model, for tests: answers, delays and faults drawn by hash of the request.

The same prompt and seed give the same tokens in every process, so that a test can tell a lost or
mixed-up answer from the right one. ``answer_of`` says what an answer must be.
"""

import asyncio
import collections
import hashlib
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_k2.engine.protocol import (
    EngineError,
    FinishReason,
    Health,
    Limits,
    Output,
    PauseMode,
    Request,
    SamplingParams,
    Token,
    check_request,
)
from megatron_k2.engine.transfer.manifest import Manifest
from megatron_k2.errors import UserError


@dataclass(frozen=True)
class Faults:
    """How often something goes wrong, and how slow it is."""

    error_rate: float = 0.0
    """Share of requests that raise ``EngineError`` after their first token."""
    token_seconds: float = 0.0
    """Between two tokens."""


def _drawn(*parts: object) -> int:
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def answer_of(prompt: Sequence[int], params: SamplingParams, vocab_size: int) -> list[Token]:
    """What ``ScriptedEngine`` answers, up to ``max_tokens`` or a stop token."""
    found = []
    for place in range(params.max_tokens):
        drawn = _drawn(tuple(prompt), params.seed, place)
        found.append(Token(drawn % vocab_size, -(drawn >> 32) / 2**32, (), "scripted"))
        if found[-1].id in params.stop_token_ids:
            break
    return found


class ScriptedEngine:
    """Answers by hash, or from a script.

    Args:
        vocab_size: ids that it knows.
        max_length: of prompt and answer.
        faults: what goes wrong.
        script: answers by prompt, instead of hashed ones; longer ones are cut by ``max_tokens``.
    """

    def __init__(
        self,
        vocab_size: int = 256,
        max_length: int = 4096,
        faults: Faults | None = None,
        script: dict[tuple[int, ...], Sequence[int]] | None = None,
    ) -> None:
        self.limits = Limits(vocab_size, max_length, 1 << 16)
        self._faults, self._script = faults or Faults(), script or {}
        self._aborted: set[str] = set()
        self._running: set[str] = set()
        self._goes = asyncio.Event()
        self._goes.set()
        self._version = "scripted"

    def _answer(self, request: Request) -> list[Token]:
        given = self._script.get(request.prompt)
        if given is None:
            return answer_of(request.prompt, request.params, self.limits.vocab_size)
        return [Token(i, -0.5, (), self._version) for i in given][: request.params.max_tokens]

    def check_grammar(self, grammar: str) -> None:
        """See the protocol: none."""
        raise UserError("a scripted engine's answers are held to no grammar")

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """See the protocol."""
        check_request(request, self.limits)
        if request.grammar is not None:
            self.check_grammar(request.grammar)
        fails = _drawn("fault", request.id) / 2**64 < self._faults.error_rate
        stops, tokens = request.params.stop_token_ids, self._answer(request)
        prompt = self._prompt_tokens(request)
        self._running.add(request.id)
        try:
            if not tokens:
                yield Output((), prompt, "length")
            for place, token in enumerate(tokens):
                await self._goes.wait()
                await asyncio.sleep(self._faults.token_seconds)
                if request.id in self._aborted:
                    yield Output(finish_reason="abort")
                    return
                if fails and place == 1:
                    raise EngineError("scripted fault")
                is_last = place == len(tokens) - 1
                is_stop = token.id in stops
                reason: FinishReason | None = "stop" if is_stop else "length"
                stop_id = token.id if is_stop else None
                yield Output(
                    (token,), prompt if not place else (), reason if is_last else None, stop_id
                )
        finally:
            self._running.discard(request.id)
            self._aborted.discard(request.id)

    def _prompt_tokens(self, request: Request) -> tuple[Token, ...]:
        if request.params.prompt_logprobs is None:
            return ()
        first, *rest = request.prompt
        return (Token(first, None), *(Token(i, -1.0) for i in rest))

    async def abort(self, ids: Iterable[str] | None = None) -> None:
        """See the protocol."""
        self._aborted |= self._running if ids is None else self._running & set(ids)

    async def pause(self, mode: PauseMode = "abort") -> None:
        """See the protocol."""
        if mode == "abort":
            await self.abort()
        while mode != "keep" and self._running:
            await asyncio.sleep(0.001)
        self._goes.clear()

    async def resume(self) -> None:
        """See the protocol."""
        self._goes.set()

    async def update_weights(
        self,
        weights: Iterable[tuple[str, Tensor]],
        version: str,
        manifest: Callable[[], Manifest] | None = None,
    ) -> None:
        """Takes the version; the weights are drawn and dropped."""
        await asyncio.to_thread(collections.deque, weights, 0)
        self._version = version

    def health(self) -> Health:
        """See the protocol."""
        is_paused = not self._goes.is_set()
        return Health(True, "", is_paused, self._version, len(self._running), 0)

    async def close(self) -> None:
        """See the protocol."""
        await self.abort()
