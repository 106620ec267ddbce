"""Request bodies: OpenAI's fields and vLLM's, read from untrusted bytes.

Fields that are unknown are passed over, as OpenAI's clients expect. Fields that are known and not
computed here are refused, so that nobody believes to have got what they asked for.
"""

import json
import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_k2.engine.protocol import SamplingParams
from megatron_k2.errors import UserError
from megatron_k2.records.read import read_json_line

MAX_TOP = 20
"""Candidates beside a token; OpenAI's bound."""
MAX_CHOICES = 128
MAX_STOPS = 16
DEFAULT_TOKENS = 16
"""``/v1/completions`` without ``max_tokens``: OpenAI's."""

Ids = Annotated[list[int], Field(max_length=1 << 21)]


class Body(BaseModel):
    """What a client sends: types as they are, and fields that nobody here knows left aside."""

    model_config = ConfigDict(extra="ignore", strict=True)


class Sampling(Body):
    """Fields that every way of asking shares."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=0, le=1 << 24)
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 31, description="-1 or 0: all")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    presence_penalty: float | None = Field(None, ge=0, le=0, description="not computed: 0")
    frequency_penalty: float | None = Field(None, ge=0, le=0, description="not computed: 0")
    logit_bias: dict[str, float] | None = Field(None, max_length=0, description="not computed")
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_STOPS * 8)
    ignore_eos: bool | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = Field(
        None, description="tokens of logprobs as 'token_id:7'; of completions alone"
    )
    return_routed_experts: bool | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_TOP)

    @property
    def stops(self) -> list[str]:
        """Strings that end an answer."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(given) > MAX_STOPS or not all(given):
            raise UserError(f"stop: {len(given)} strings; expected up to {MAX_STOPS}, none empty")
        return given

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends in its token counts."""
        return bool((self.stream_options or {}).get("include_usage"))

    def params(self, max_tokens: int, end_ids: tuple[int, ...], num_top: int) -> SamplingParams:
        """The engine's.

        Args:
            max_tokens: settled by the caller.
            end_ids: of the model, unless ``ignore_eos``.
            num_top: candidates beside each token.
        """
        given = {
            name: value
            for name in ("temperature", "top_p", "min_p", "repetition_penalty")
            if (value := getattr(self, name)) is not None
        }
        ends = () if self.ignore_eos else end_ids
        seed = secrets.randbits(62) if self.seed is None else self.seed
        return SamplingParams(
            max_tokens=max_tokens,
            top_k=max(0, self.top_k or 0),
            stop_token_ids=(*ends, *(self.stop_token_ids or ())),
            seed=seed % (1 << 63),
            logprobs=num_top,
            prompt_logprobs=self.prompt_logprobs,
            returns_routed_experts=bool(self.return_routed_experts),
            **given,
        )


class CompletionBody(Sampling):
    """``/v1/completions``."""

    prompt: str | Ids | list[str] | list[Ids]
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    echo: bool | None = None
    suffix: None = Field(None, description="not computed")
    best_of: int | None = Field(None, ge=1, le=1, description="not computed: 1")


class NamedFunction(Body):
    """A function by its name."""

    name: str


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class NamedSchema(Body):
    """OpenAI's ``json_schema``: always enforced, whatever ``strict`` says."""

    schema_: dict[str, Any] = Field({}, alias="schema")


class ResponseFormat(Body):
    """What an answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class ChatBody(Sampling):
    """``/v1/chat/completions``."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0, le=1 << 24)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP)


class TokenSampling(Sampling):
    """``sampling_params`` of ``/inference/v1/generate``."""

    logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    n: int | None = Field(None, ge=1, le=1, description="one answer a request")
    stream: Literal[False] | None = None
    stop: None = Field(None, description="strings are for the routes that speak text")


class GenerateBody(Body):
    """``/inference/v1/generate``: tokens in, tokens out; vLLM's."""

    token_ids: Ids
    sampling_params: dict[str, Any] = {}
    request_id: str | None = Field(None, max_length=256)


class TokenizeBody(Body):
    """``/tokenize``: of a text, or of a dialogue as the chat would read it."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = Field(None, min_length=1)
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True


class DetokenizeBody(Body):
    """``/detokenize``."""

    tokens: Ids


class AbortBody(Body):
    """``/abort_requests``: none named, all of them."""

    request_ids: list[str] | None = None


class TransferInfo(Body):
    """``init_info``."""

    backend: str = Field(max_length=64)


class InitTransferBody(Body):
    """``/init_weight_transfer_engine``."""

    init_info: TransferInfo


class StartUpdateBody(Body):
    """``/start_weight_update``; vLLM names the version at the end alone."""

    weight_version: str = Field(max_length=256)


class BucketInfo(Body):
    """``update_info``: a safetensors file of the server's own directory."""

    file: str = Field(max_length=256)


class UpdateBody(Body):
    """``/update_weights``."""

    update_info: BucketInfo


class FinishUpdateBody(Body):
    """``/finish_weight_update``."""

    weight_version: str = Field(max_length=256)
    manifest: str = Field(max_length=256, description="a file of the server's own directory")


def read_body[Kind: Body](kind: type[Kind], content: bytes) -> Kind:
    """A body of some kind.

    Raises:
        UserError: it is not UTF-8, not JSON, or a field is wrong; says which.
    """
    try:
        value = read_json_line(content)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError("a string holds a lone surrogate, which UTF-8 does not have") from None
    except RecursionError:
        raise UserError("nested too deeply") from None
    except ValueError as error:
        raise UserError(str(error)) from None
    return validated(kind, value)


def validated[Fields: BaseModel](kind: type[Fields], value: Any, *above: str) -> Fields:
    """Fields of some kind.

    Args:
        kind: which.
        value: parsed JSON.
        above: names of the fields that ``value`` stands in.

    Raises:
        UserError: the first complaint, by field.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(map(str, (*above, *first["loc"]))) or "body"
    found = repr(first.get("input"))
    raise UserError(f"{where}: {first['msg']} (found {found[:80]})")
