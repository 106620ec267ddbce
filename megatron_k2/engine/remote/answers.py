"""A request as a body of ``/v1/completions``, and its answer as the protocol's output."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import zip_longest
from typing import Any

from megatron_k2.engine.protocol import (
    Candidate,
    EngineError,
    FinishReason,
    Output,
    Request,
    Token,
)
from megatron_k2.engine.server.routes import decoded_routes
from megatron_k2.records.routes import Routes

_PREFIX = "token_id:"


def body_of(request: Request, model: str | None) -> dict[str, Any]:
    """What to post."""
    params = request.params
    body = {
        "model": model,
        "prompt": list(request.prompt),
        "max_tokens": max(params.max_tokens, 1),  # vLLM's least; what is too much is cut again
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "stop_token_ids": list(params.stop_token_ids),
        "ignore_eos": True,  # what ends an answer is in ``stop_token_ids`` alone
        "seed": params.seed,
        "logprobs": params.logprobs,
        "prompt_logprobs": params.prompt_logprobs,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    if params.returns_routed_experts:
        body["return_routed_experts"] = True
    return {name: value for name, value in body.items() if value is not None}


def output_of(answer: Any, request: Request) -> Output:
    """The answer, whole.

    Raises:
        EngineError: it is none to this request.
    """
    try:
        (choice,) = answer["choices"]
        tokens = _tokens(choice)
        prompt = _prompt_tokens(choice, request)
        recorded = choice["routed_experts"] if request.params.returns_routed_experts else None
        if recorded is not None:  # vLLM: null where it was not told to record, or is dense
            routes = decoded_routes(recorded)
            prompt = prompt or tuple(Token(i, None) for i in request.prompt)
            prompt, tokens = _routed(prompt, tokens, routes)
        reason = str(choice["finish_reason"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise EngineError(f"an answer that is not as vLLM's: {error!r}") from None
    return whole_output(request, prompt, tokens, reason)


def whole_output(
    request: Request, prompt: tuple[Token, ...], tokens: tuple[Token, ...], reason: str
) -> Output:
    """An answer that came at once; the token that was asked for beyond ``max_tokens`` 0 is cut.

    Args:
        request: that it answers.
        prompt: tokens of the prompt, where they were asked for.
        tokens: of the answer.
        reason: why it ended, by the name that vLLM and SGLang share with the protocol.

    Raises:
        EngineError: there is no such reason.
    """
    reasons: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}
    if reason not in reasons:
        raise EngineError(f"an answer ended with {reason!r}; expected {', '.join(reasons)}")
    if not request.params.max_tokens:
        return Output((), prompt, "length")
    last = tokens[-1].id if tokens else None
    is_stop = reason == "stop" and last in request.params.stop_token_ids
    return Output(tokens, prompt, reasons[reason], last if is_stop else None)


def tagged(output: Output, version: str) -> Output:
    """The same, its tokens of this version where the server does not say theirs."""
    tokens = tuple(
        t if t.weight_version else replace(t, weight_version=version) for t in output.tokens
    )
    return replace(output, tokens=tokens)


def _tokens(choice: Mapping[str, Any]) -> tuple[Token, ...]:
    ids, scores = choice["token_ids"], choice["logprobs"]
    versions = choice.get("weight_versions") or [""] * len(ids)
    tops = scores.get("top_logprobs") or [None] * len(ids)
    return tuple(
        Token(int(i), float(logprob), _candidates(top or {}), str(version))
        for i, logprob, top, version in zip(
            ids, scores["token_logprobs"], tops, versions, strict=True
        )
    )


def _candidates(top: Mapping[str, float]) -> tuple[Candidate, ...]:
    found = [Candidate(int(name.removeprefix(_PREFIX)), float(p)) for name, p in top.items()]
    return tuple(sorted(found, key=lambda candidate: (-candidate.logprob, candidate.id)))


def _prompt_tokens(choice: Mapping[str, Any], request: Request) -> tuple[Token, ...]:
    if request.params.prompt_logprobs is None:
        return ()
    found = [Token(request.prompt[0], None)]
    for i, scores in zip(request.prompt[1:], choice["prompt_logprobs"][1:], strict=True):
        others = {name: score["logprob"] for name, score in scores.items()}
        top = _candidates(others)[: request.params.prompt_logprobs]
        found.append(Token(i, float(others[str(i)]), top))
    return tuple(found)


def _routed(
    prompt: tuple[Token, ...],
    tokens: tuple[Token, ...],
    routes: Routes,
) -> tuple[tuple[Token, ...], tuple[Token, ...]]:
    """The same with experts; the last token was never an input."""
    every = (*prompt, *tokens)
    if len(routes) not in (len(every), len(every) - 1):
        raise ValueError(f"routed experts of {len(routes)} of {len(every)} tokens")
    with_routes = [
        Token(token.id, token.logprob, token.top, token.weight_version, own)
        for token, own in zip_longest(every, routes)
    ]
    return tuple(with_routes[: len(prompt)]), tuple(with_routes[len(prompt) :])
