"""Routes that speak token ids: ``/inference/v1/generate``, ``/tokenize``, ``/detokenize``."""

from typing import Any

from megatron_k2.engine.server.bodies import (
    DEFAULT_TOKENS,
    DetokenizeBody,
    GenerateBody,
    TokenizeBody,
    TokenSampling,
    validated,
)
from megatron_k2.engine.server.routes import encoded_routes
from megatron_k2.engine.server.service import Service
from megatron_k2.errors import UserError


async def generate(service: Service, body: GenerateBody, name: str) -> dict[str, Any]:
    """Token ids in, token ids with log-probabilities and weight versions out."""
    fields = validated(TokenSampling, body.sampling_params, "sampling_params")
    max_tokens = DEFAULT_TOKENS if fields.max_tokens is None else fields.max_tokens
    params = fields.params(max_tokens, service.end_ids, fields.logprobs or 0)
    answer = await service.whole(name, tuple(body.token_ids), params)
    found: dict[str, Any] = {
        "request_id": name,
        "token_ids": [token.id for token in answer.tokens],
        "logprobs": [token.logprob for token in answer.tokens],
        "top_logprobs": [[list(c) for c in token.top] for token in answer.tokens],
        "weight_versions": [token.weight_version for token in answer.tokens],
        "finish_reason": answer.reason,
        "stop_reason": answer.stop,
    }
    if params.prompt_logprobs is not None:
        found["prompt_logprobs"] = [token.logprob for token in answer.prompt_tokens]
    if params.returns_routed_experts:
        found["routed_experts"] = encoded_routes([*answer.prompt_tokens, *answer.tokens])
    return found


def tokenize(service: Service, body: TokenizeBody) -> dict[str, Any]:
    """Ids of a text, or of a dialogue."""
    if (body.prompt is None) == (body.messages is None):
        raise UserError("give prompt or messages, one of them")
    if body.messages is not None:
        messages, tools = service.dialogue(body.messages, body.tools)
        prompt = body.add_generation_prompt
        ids = service.renderer.render(messages, tools, add_generation_prompt=prompt).ids
    else:
        ids = list(service.encode(body.prompt or ""))
    return {
        "tokens": ids,
        "count": len(ids),
        "max_model_len": service.engine.limits.max_length,
    }


def detokenize(service: Service, body: DetokenizeBody) -> dict[str, Any]:
    """Text of ids.

    Raises:
        UserError: an id that the model has not.
    """
    vocab = service.engine.limits.vocab_size
    if wrong := [i for i in body.tokens if not 0 <= i < vocab]:
        raise UserError(f"token {wrong[0]}: this model has 0 to {vocab - 1}")
    return {"prompt": service.tokenizer.decode(body.tokens)}
