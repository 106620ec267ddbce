"""SGLang's own API behind the engine's protocol: ``/generate``, verbs, a round from a directory.

**Not run against a real SGLang**, of which there is no build for a CPU: read from its source (0.5),
and tested against a stand-in that speaks as that source does. What to know of it:

- Log-probabilities are those after the temperature, unless its server was started with
  ``SGLANG_RETURN_ORIGINAL_LOGPROB=1``: without it a trainer is told wrong numbers, silently.
- A request's seed counts with ``--enable-deterministic-inference`` alone.
- Routed experts come without their shape and are not asked for.
- New weights are a directory that it reads (``/update_weights_from_disk``). It says neither what it
  read nor what it holds: ``engine check`` does.
"""

import os
import shutil
import uuid
from typing import Any

from megatron_k2.engine.protocol import (
    Candidate,
    EngineError,
    Output,
    Request,
    Token,
    UpdateCode,
    UpdateError,
)
from megatron_k2.engine.remote.answers import whole_output
from megatron_k2.engine.remote.client import Client
from megatron_k2.engine.remote.endpoints import State
from megatron_k2.engine.transfer.bucket_files import BucketFolder
from megatron_k2.errors import UserError

GENERATE = "/generate"
PAUSE, RESUME, INFO = "/pause_generation", "/continue_generation", "/model_info"
PAUSE_MODES = {"abort": "abort", "keep": "retract"}
"""Of ours, its: what is retracted is read again by the weights of then. It has none that waits."""
_ALL = -1


def body_of(request: Request) -> dict[str, Any]:
    """What to post to ``GENERATE``.

    Raises:
        UserError: routed experts are asked for.
    """
    params = request.params
    if params.returns_routed_experts:
        raise UserError("routed experts of SGLang come without their shape; leave them out")
    sampling = {
        "max_new_tokens": max(params.max_tokens, 1),
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k or _ALL,
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "stop_token_ids": list(params.stop_token_ids),
        "ignore_eos": True,
        "sampling_seed": params.seed,
    }
    return {
        "rid": request.id,
        "input_ids": list(request.prompt),
        "sampling_params": {name: value for name, value in sampling.items() if value is not None},
        "return_logprob": True,
        "logprob_start_len": _ALL if params.prompt_logprobs is None else 0,
        "top_logprobs_num": max(params.logprobs, params.prompt_logprobs or 0),
    }


def output_of(answer: Any, request: Request) -> Output:
    """The answer, whole.

    Raises:
        EngineError: it is none to this request.
    """
    try:
        about = answer["meta_info"]
        version = str(about.get("weight_version") or "")
        params = request.params
        tops = about.get("output_top_logprobs") or []
        tokens = _tokens(about["output_token_logprobs"], tops, params.logprobs, version)
        prompt: tuple[Token, ...] = ()
        if params.prompt_logprobs is not None:
            tops = about.get("input_top_logprobs") or []
            prompt = _tokens(about["input_token_logprobs"], tops, params.prompt_logprobs, version)
            if tuple(token.id for token in prompt) != request.prompt:
                raise ValueError("log-probabilities of another prompt")
        reason = str(about["finish_reason"]["type"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise EngineError(f"an answer that is not as SGLang's: {error!r}") from None
    return whole_output(request, prompt, tokens, reason)


def _tokens(rows: Any, tops: Any, count: int, version: str) -> tuple[Token, ...]:
    """Of [log-probability, id, text] a token; the prompt's first one has no log-probability."""
    found = []
    for place, (logprob, number, *_) in enumerate(rows):
        likeliest = tops[place] if count and place < len(tops) and tops[place] else []
        candidates = tuple(Candidate(int(row[1]), float(row[0])) for row in likeliest[:count])
        value = None if logprob is None else float(logprob)
        found.append(Token(int(number), value, candidates, version))
    return tuple(found)


class DirectoryRound:
    """One server's part in a round: ``begin``, ``give`` as often as there are buckets, ``end``.

    It is paused for the round, and stays so where one of them raises.

    Args:
        client: of the server.
        state: which of the client's endpoints it is.
        version: of the weights.
    """

    def __init__(self, client: Client, state: State, version: str) -> None:
        self._client, self._state, self._version = client, state, version
        self._folder: BucketFolder | None = None

    @property
    def folder(self) -> BucketFolder:
        """Where files for it are to lie; from ``begin`` on."""
        assert self._folder is not None
        return self._folder

    async def begin(self) -> None:
        """It answers nothing from here on.

        Raises:
            UserError: nobody said where it reads weights.
        """
        under = self._state.endpoint.weights_dir
        if under is None:
            raise UserError(f"{self._state.endpoint.base}: give the weights_dir of its endpoint")
        self._folder = BucketFolder(under)
        await self._client.once(self._state, "POST", PAUSE, {"mode": "abort"})
        self._whole = self._folder.directory / uuid.uuid4().hex
        self._whole.mkdir()

    async def give(self, name: str) -> None:
        """Some of the weights, kept under a name of this round's until ``end``."""
        os.link(self.folder.require(name), self._whole / name)

    async def end(self, manifest: str) -> None:
        """That was all: the server reads it.

        Args:
            manifest: of no use to it.

        Raises:
            UpdateError: it says that it could not, or serves other weights afterwards.
        """
        del manifest
        body = {"model_path": str(self._whole), "weight_version": self._version}
        try:
            said = await self._client.once(
                self._state, "POST", "/update_weights_from_disk", body | {"flush_cache": True}
            )
        finally:
            shutil.rmtree(self._whole, ignore_errors=True)
        base = self._state.endpoint.base
        if not said.get("success"):
            raise UpdateError(UpdateCode.WEIGHTS, f"{base}: {said.get('message')}")
        info = await self._client.once(self._state, "GET", INFO)
        if (served := info.get("weight_version")) != self._version:
            raise UpdateError(
                UpdateCode.VERSION, f"{base} says that it serves {served!r}, not {self._version!r}"
            )
        await self._client.once(self._state, "POST", RESUME, {})
