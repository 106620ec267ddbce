"""Which of several endpoints gets the next request, and how long a failed one is left alone.

No input, no output and no clock of its own: whoever calls says what time it is.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from megatron_k2.errors import UserError

Api = Literal["openai", "sglang"]


@dataclass(frozen=True)
class Endpoint:
    """One server; what it speaks is ``api``.

    Raises:
        UserError: the address is none, or holds a key; or the weight is not positive.
    """

    url: str
    """``http(s)://host:port``, with or without ``/v1`` behind it."""
    weight: float = 1.0
    """Its share of the requests, against the others'."""
    key_env: str | None = None
    """Environment variable with the key; a key itself is written nowhere."""
    key_file: Path | None = None
    """File with the key, where there is no such variable."""
    weights_dir: Path | None = None
    """Where it reads new weights, of a server that does not say it itself."""
    api: Api = "openai"
    """What it speaks: OpenAI's as vLLM and our own server do, or SGLang's own."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.username or parts.password or parts.query:
            host = parts.hostname or "…"
            raise UserError(
                f"endpoint at {host}: the address holds a user, a password or a query; keys belong "
                "into an environment variable, named by key_env"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"endpoint {self.url!r}: expected http://host:port or https://host")
        if self.weight <= 0:
            raise UserError(f"endpoint {self.url}: weight {self.weight:g}, expected more than 0")

    @property
    def base(self) -> str:
        """The address that routes begin with, ``/v1`` cut."""
        return self.url.rstrip("/").removesuffix("/v1")


@dataclass(frozen=True)
class Policy:
    """How long and how often is tried.

    Raises:
        UserError: a value is not positive.
    """

    concurrency: int = 256
    """Requests under way at once, over all endpoints; more wait."""
    attempts: int = 8
    """Of one request, the first counted."""
    attempt_seconds: float = 120.0
    deadline_seconds: float = 600.0
    """Of one request, all its attempts and waits."""
    backoff_seconds: float = 0.25
    """Before the second attempt, on average; doubled before each further one."""
    most_backoff_seconds: float = 20.0
    failures_to_rest: int = 5
    """In a row, after which an endpoint is left alone for a while."""
    failing_seconds: float = 1.0
    """That such a row must last: of many requests under way, failures come in bursts."""
    rest_seconds: float = 5.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise UserError(f"{name} {value:g}: expected more than 0")

    def wait(self, attempt: int, asked: float | None, draws: random.Random) -> float:
        """Seconds before the next attempt.

        Args:
            attempt: that has failed, from 1.
            asked: by ``Retry-After``; at least so long.
            draws: so that many that failed together do not come back together.
        """
        most = min(self.most_backoff_seconds, self.backoff_seconds * 2 ** (attempt - 1))
        drawn = most * draws.uniform(0.5, 1.5)
        return drawn if asked is None else asked + drawn * 0.1


@dataclass
class State:
    """One endpoint, as this process knows it."""

    endpoint: Endpoint
    num_running: int = 0
    num_answered: int = 0
    num_failed: int = 0
    failures_in_row: int = 0
    failing_since: float = 0.0
    """When the first of them was."""
    rests_until: float = 0.0
    why: str = ""
    """Of the last failure."""
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    """With the key."""


class Endpoints:
    """The endpoints' shares and rests.

    Args:
        endpoints: one or more.
        policy: when they rest.

    Raises:
        UserError: none, or one twice.
    """

    def __init__(self, endpoints: Sequence[Endpoint], policy: Policy) -> None:
        if not endpoints:
            raise UserError("no endpoint; give the address of one at least")
        if len({endpoint.base for endpoint in endpoints}) < len(endpoints):
            raise UserError("an endpoint is named twice; give it a larger weight instead")
        self.states = [State(endpoint) for endpoint in endpoints]
        self._policy = policy

    def choose(self, now: float, tried: State | None = None) -> State:
        """The least busy for its weight of those that do not rest; of resting ones the first back.

        Args:
            now: seconds.
            tried: just failed at this request: another one is taken where there is one.
        """
        awake = [state for state in self.states if state.rests_until <= now]
        if not awake:
            return min(self.states, key=lambda state: state.rests_until)
        others = [state for state in awake if state is not tried] or awake
        return min(others, key=lambda s: ((s.num_running + 1) / s.endpoint.weight, s.num_answered))

    def succeeded(self, state: State) -> None:
        """It answered."""
        state.num_answered += 1
        state.failures_in_row = 0

    def failed(self, state: State, why: str, now: float, *, is_busy: bool = False) -> None:
        """It did not; ``is_busy``: because it has too much to do, which is no fault."""
        state.num_failed += 1
        state.why = why
        if is_busy:
            return
        if not state.failures_in_row:
            state.failing_since = now
        state.failures_in_row += 1
        is_long = now - state.failing_since >= self._policy.failing_seconds
        if state.failures_in_row >= self._policy.failures_to_rest and is_long:
            state.rests_until = now + self._policy.rest_seconds

    def is_awake(self, now: float) -> bool:
        """Whether any of them may be asked."""
        return any(state.rests_until <= now for state in self.states)
