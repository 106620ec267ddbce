"""What everything above sees of a model: token ids in, tokens with log-probabilities out.

An engine may be ``engine/local`` in this process, ``engine/scripted`` in a test, or a server
elsewhere; evaluation, the gym's judges, synthesis and RL name none of them. An engine knows token
ids only. Chat, tools and stop strings belong to what stands above it.
"""

from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from megatron_k2.errors import UserError
from megatron_k2.records.routes import Routes

if TYPE_CHECKING:
    from torch import Tensor  # clients of engines elsewhere do without torch

    from megatron_k2.engine.transfer.manifest import Manifest

FinishReason = Literal["stop", "length", "abort"]
PauseMode = Literal["abort", "wait", "keep"]
"""What happens to requests in flight: ended at once, finished first, or frozen where they are."""


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn; vLLM's names.

    Log-probabilities are those of the model's own distribution at ``temperature`` 1, before any
    filter or penalty, which is what a trainer can compute again.

    Raises:
        UserError: a value outside its range.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    """0 takes the largest logit, the lowest id of equals."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all."""
    min_p: float = 0.0
    """Tokens less likely than this share of the likeliest are left out."""
    repetition_penalty: float = 1.0
    """Divides positive logits, multiplies negative ones, of tokens in the prompt or the answer."""
    stop_token_ids: tuple[int, ...] = ()
    """Each ends the answer and is its last token."""
    seed: int | None = None
    """Of this request alone; ``None`` draws one. A draw hangs on it and on the token's place, so an
    answer's beginning that comes back as part of the prompt is continued with the same draws."""
    logprobs: int = 0
    """How many of the likeliest tokens come with each sampled one."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens, each given those before it; ``None``: none."""
    returns_routed_experts: bool = False

    def __post_init__(self) -> None:
        checks = (
            ("max_tokens", self.max_tokens >= 0, "0 or more"),
            ("temperature", 0 <= self.temperature <= 100, "0 to 100"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 100, "more than 0, at most 100"),
            ("logprobs", self.logprobs >= 0, "0 or more"),
            ("prompt_logprobs", (self.prompt_logprobs or 0) >= 0, "0 or more"),
        )
        for name, is_right, expected in checks:
            if not is_right:
                raise UserError(f"{name} {getattr(self, name)}: expected {expected}")


class Constraint(Protocol):
    """What one answer may consist of, asked before each token where the answer is computed."""

    @property
    def fault(self) -> str:
        """Why it was given up; the answer is ended there. Empty: it was not."""
        ...

    def allowed(self) -> "Tensor":
        """Tokens that may come next, [vocabulary] bool on the CPU, at least one."""
        ...

    def accept(self, token: int) -> None:
        """This one came."""
        ...


@dataclass(frozen=True)
class Request:
    """One prompt to continue."""

    id: str
    """Unique among those in flight; what ``abort`` names."""
    prompt: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    grammar: str | None = None
    """Of ``engine/grammar.py``: what the answer may be. Log-probabilities stay those of the model,
    before it."""


class Candidate(NamedTuple):
    """A token that might stand at a place."""

    id: int
    logprob: float


@dataclass(frozen=True)
class Token:
    """One token of an answer or, where asked for, of a prompt."""

    id: int
    logprob: float | None
    """Natural logarithm; ``None`` for a prompt's first token."""
    top: tuple[Candidate, ...] = ()
    """The likeliest at this place, best first."""
    weight_version: str = ""
    """Of the weights that computed ``logprob``."""
    routed_experts: Routes | None = None
    """Where the router sent this token *as input*; ``None`` if not asked for, or for an answer's
    last token, which was never an input."""


@dataclass(frozen=True)
class Output:
    """A step of one answer."""

    tokens: tuple[Token, ...] = ()
    """New since the output before."""
    prompt_tokens: tuple[Token, ...] = ()
    """Once, with the first output, where ``prompt_logprobs`` or routed experts were asked for."""
    finish_reason: FinishReason | None = None
    """Of the last output."""
    stop_id: int | None = None
    """Which of ``stop_token_ids`` ended it."""
    fault: str = ""
    """Why the answer is held to its grammar no longer."""


class Limits(NamedTuple):
    """What fits into an engine."""

    vocab_size: int
    max_length: int
    """Prompt and answer together."""
    num_slots: int
    """Sequences decoded at once; more wait."""


def check_request(request: Request, limits: Limits) -> None:
    """Refuse what an engine of these limits can never answer.

    Raises:
        UserError: with the number that is wrong.
    """
    params, length = request.params, len(request.prompt)
    if not request.prompt:
        raise UserError("an empty prompt; give at least one token")
    for token in (min(request.prompt), max(request.prompt), *params.stop_token_ids):
        if not 0 <= token < limits.vocab_size:
            raise UserError(f"token {token}: this model has 0 to {limits.vocab_size - 1}")
    if length + params.max_tokens > limits.max_length:
        raise UserError(
            f"{length} tokens of prompt and up to {params.max_tokens} new ones are more than the "
            f"{limits.max_length} of a slot; ask for fewer, or start with longer slots"
        )
    for name in ("logprobs", "prompt_logprobs"):
        if ((wanted := getattr(params, name)) or 0) > limits.vocab_size:
            raise UserError(f"{name} {wanted}: this model has {limits.vocab_size} tokens")


class Health(NamedTuple):
    """How an engine is."""

    is_ready: bool
    """False: it answers nothing until this is mended; ``detail`` says why."""
    detail: str
    is_paused: bool
    weight_version: str
    num_running: int
    num_waiting: int


NO_WEIGHTS = "none"
"""The weight version of an engine that has been given none: it answers nothing until it is."""


class EngineError(RuntimeError):
    """The engine cannot answer, for a reason that is not the request's: dead, or half updated."""


class UpdateCode(StrEnum):
    """How a round of new weights ended."""

    OK = "ok"
    SOURCE = "source"
    """The side that sends stopped: an error of its own, or it is gone."""
    DELIVERY = "delivery"
    """What came was cut, out of order, or of another round."""
    WEIGHTS = "weights"
    """A tensor was unknown, came twice, had another shape, or never came."""
    CHECKSUM = "checksum"
    """The engine holds other bits than were sent."""
    VERSION = "version"
    """The tag of what came, or of what the engine serves, is not the round's."""
    ENGINE = "engine"
    """It could not be reached, or failed."""


class UpdateError(EngineError):
    """A round of new weights that is not whole: the engine answers nothing until one is."""

    def __init__(self, code: UpdateCode, detail: str) -> None:
        super().__init__(detail)
        self.code = code


class Engine(Protocol):
    """Every engine. All of it is called from one event loop."""

    @property
    def limits(self) -> Limits:
        """Fixed for the engine's life."""
        ...

    def check_grammar(self, grammar: str) -> None:
        """Refuse what no answer of this engine can be held to; from any thread, since it compiles.

        Raises:
            UserError: with the reason.
        """
        ...

    def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """The answer, as it grows. Closing it early ends the request.

        Raises:
            UserError: the request cannot fit, names tokens that do not exist, or has a grammar that
                ``check_grammar`` refuses; at the first step.
            EngineError: the engine died, or its weights are not whole.
        """
        ...

    async def abort(self, ids: Iterable[str] | None = None) -> None:
        """End these requests, or all, with ``abort``; unknown ones are passed over."""
        ...

    async def pause(self, mode: PauseMode = "abort") -> None:
        """Decode nothing more; returns when nothing runs. New requests wait."""
        ...

    async def resume(self) -> None:
        """Go on."""
        ...

    async def update_weights(
        self,
        weights: "Iterable[tuple[str, Tensor]]",
        version: str,
        manifest: "Callable[[], Manifest] | None" = None,
    ) -> None:
        """Replace every weight; tokens computed from here on carry ``version``.

        Args:
            weights: Hugging Face names and tensors, all of them, in any order.
            version: Whatever the trainer calls them.
            manifest: Asked once all have been drawn: what was sent. What the engine then holds must
                be that, bit for bit.

        Raises:
            UpdateError: something was missing, unknown, of another shape, or is not what was sent.
                The engine is then not ready until an update succeeds, and answers nothing
                meanwhile.
        """
        ...

    def health(self) -> Health:
        """Now, without waiting."""
        ...

    async def close(self) -> None:
        """End everything; the engine is of no use afterwards."""
        ...
