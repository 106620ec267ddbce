"""What differs between servers that speak alike: paths and bodies, by what an endpoint speaks."""

from collections.abc import Callable
from typing import Any, NamedTuple

from megatron_k2.engine.protocol import Output, PauseMode, Request
from megatron_k2.engine.remote import answers, sglang
from megatron_k2.engine.remote.client import Client
from megatron_k2.engine.remote.endpoints import Api, State
from megatron_k2.engine.remote.rounds import FileRound, Round
from megatron_k2.engine.remote.sglang import DirectoryRound
from megatron_k2.errors import UserError


class Verb(NamedTuple):
    """Something to post."""

    path: str
    body: Any = None


class Dialect(NamedTuple):
    """Of one kind of server."""

    generate: str
    """Path of a request."""
    body_of: Callable[[Request, str | None], dict[str, Any]]
    """Of a request to the model of this name."""
    output_of: Callable[[Any, Request], Output]
    pause: Callable[[PauseMode], Verb]
    resume: Verb
    info: str
    """Path that says ``weight_version``."""
    round_of: Callable[[Client, State, str], Round]
    """Of weights of this version."""


def _paused_by_sglang(mode: PauseMode) -> Verb:
    if mode not in sglang.PAUSE_MODES:
        raise UserError(f"pause mode {mode!r}: SGLang has {', '.join(sglang.PAUSE_MODES)}")
    return Verb(sglang.PAUSE, {"mode": sglang.PAUSE_MODES[mode]})


_DIALECTS: dict[Api, Dialect] = {
    "openai": Dialect(
        "/v1/completions",
        answers.body_of,
        answers.output_of,
        lambda mode: Verb(f"/pause?mode={mode}"),
        Verb("/resume"),
        "/weight_info",
        FileRound,
    ),
    "sglang": Dialect(
        sglang.GENERATE,
        lambda request, _model: sglang.body_of(request),
        sglang.output_of,
        _paused_by_sglang,
        Verb(sglang.RESUME, {}),
        sglang.INFO,
        DirectoryRound,
    ),
}


def dialect_of(states: list[State]) -> Dialect:
    """Of all of them.

    Raises:
        UserError: they speak differently.
    """
    apis = {state.endpoint.api for state in states}
    if len(apis) > 1:
        raise UserError(f"endpoints of one engine speak {' and '.join(sorted(apis))}; give one api")
    return _DIALECTS[apis.pop()]
