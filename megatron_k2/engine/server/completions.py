"""``/v1/completions``: prompts as text or token ids, several at once, echoed and scored."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from megatron_k2.engine.protocol import SamplingParams, Token
from megatron_k2.engine.server.bodies import DEFAULT_TOKENS, CompletionBody
from megatron_k2.engine.server.routes import encoded_routes
from megatron_k2.engine.server.service import Service, Whole, gathered, merged, params_of_choices
from megatron_k2.errors import UserError

KIND = "text_completion"

type Choice = tuple[tuple[int, ...], SamplingParams]


def prompts_of(service: Service, body: CompletionBody) -> list[tuple[int, ...]]:
    """The body's prompts as ids.

    Raises:
        UserError: there is none.
    """
    given = body.prompt
    if isinstance(given, str):
        given = [given]
    if given and isinstance(given[0], int):
        given = [given]  # type: ignore[list-item]
    found = [service.encode(p) if isinstance(p, str) else tuple(p) for p in given]  # type: ignore[arg-type]
    if not found or not all(found):
        raise UserError("prompt: empty; give a text, token ids, or a list of either")
    return found


def choices_of(service: Service, body: CompletionBody) -> list[Choice]:
    """A prompt and its parameters for each choice, in the answer's order."""
    max_tokens = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not (body.echo or body.prompt_logprobs is not None):
        raise UserError("max_tokens 0 without echo: nothing is asked for")
    params = body.params(max_tokens, service.end_ids, body.logprobs or 0)
    if body.echo and body.logprobs is not None:
        params = replace(params, prompt_logprobs=body.logprobs)
    each = params_of_choices(params, body.n or 1)
    return [(prompt, own) for prompt in prompts_of(service, body) for own in each]


async def complete(service: Service, body: CompletionBody, name: str) -> dict[str, Any]:
    """The whole answer."""
    choices = choices_of(service, body)
    answers: list[Whole] = await gathered(
        [
            service.whole(f"{name}-{place}", prompt, params, body.stops)
            for place, (prompt, params) in enumerate(choices)
        ]
    )
    found = [
        _choice(service, body, place, prompt, answer)
        for place, ((prompt, _), answer) in enumerate(zip(choices, answers, strict=True))
    ]
    return service.envelope(name, KIND) | {
        "choices": found,
        "usage": usage([len(p) for p, _ in choices[:: body.n or 1]], answers),
    }


def usage(prompts: Sequence[int], answers: Sequence[Whole]) -> dict[str, int]:
    """Token counts of prompts and answers."""
    asked, made = sum(prompts), sum(len(answer.tokens) for answer in answers)
    return {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}


def _choice(
    service: Service, body: CompletionBody, place: int, prompt: tuple[int, ...], answer: Whole
) -> dict[str, Any]:
    text, tokens = answer.text, list(answer.tokens)
    if body.echo:
        text = service.tokenizer.decode(list(prompt)) + text
        tokens = [*answer.prompt_tokens, *tokens]
    found: dict[str, Any] = {
        "index": place,
        "text": text,
        "logprobs": _logprobs(service, body, tokens),
        "finish_reason": answer.reason,
        "stop_reason": answer.stop,
    }
    if body.prompt_logprobs is not None:
        found["prompt_logprobs"] = [_scored(service, token) for token in answer.prompt_tokens]
    if body.return_token_ids:
        found["prompt_token_ids"] = list(prompt)
        found["token_ids"] = [token.id for token in answer.tokens]
        found["weight_versions"] = [token.weight_version for token in answer.tokens]
    if body.return_routed_experts:
        found["routed_experts"] = encoded_routes([*answer.prompt_tokens, *answer.tokens])
    return found


def _logprobs(
    service: Service, body: CompletionBody, tokens: Sequence[Token]
) -> dict[str, list[Any]] | None:
    """OpenAI's four lists, where they are asked for."""
    if body.logprobs is None:
        return None

    def shown(token: int) -> str:
        is_id = body.return_tokens_as_token_ids
        return f"token_id:{token}" if is_id else service.tokenizer.decode([token])

    texts = [shown(token.id) for token in tokens]
    offsets, at = [], 0
    for text in texts:
        offsets.append(at)
        at += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{shown(c.id): c.logprob for c in token.top} or None for token in tokens],
        "text_offset": offsets,
    }


def _scored(service: Service, token: Token) -> dict[str, Any] | None:
    """Scores of one prompt token in the form of vLLM: by id, itself first."""
    if token.logprob is None:
        return None
    pairs = {token.id: token.logprob} | {c.id: c.logprob for c in token.top}
    return {
        str(i): {"logprob": value, "decoded_token": service.tokenizer.decode([i])}
        for i, value in pairs.items()
    }


async def stream(service: Service, body: CompletionBody, name: str) -> AsyncGenerator[Any, None]:
    """The answer in pieces; the last, where asked for, is the usage."""
    if body.echo or body.prompt_logprobs is not None or body.return_routed_experts:
        raise UserError("stream: not together with echo, prompt_logprobs or routed experts")
    choices = choices_of(service, body)
    answers = [Whole() for _ in choices]
    streams = [
        service.answer(f"{name}-{place}", prompt, params, body.stops)
        for place, (prompt, params) in enumerate(choices)
    ]
    async for place, piece in merged(streams):
        answers[place].tokens += piece.tokens
        if not (piece.text or piece.reason or piece.tokens):
            continue
        found: dict[str, Any] = {
            "index": place,
            "text": piece.text,
            "logprobs": _logprobs(service, body, piece.tokens),
            "finish_reason": piece.reason,
            "stop_reason": piece.stop,
        }
        if body.return_token_ids:
            found["token_ids"] = [token.id for token in piece.tokens]
        yield service.envelope(name, KIND) | {"choices": [found]}
    if body.includes_usage:
        counts = usage([len(p) for p, _ in choices[:: body.n or 1]], answers)
        yield service.envelope(name, KIND) | {"choices": [], "usage": counts}
