"""A task, an environment that plays it, a verdict: what RL, synthesis and evaluation see of a gym.

A verdict has three values. *Unknown* says that the verifier did not do its work (it raised, hung,
died, lacks a package); a trainer masks it. It is never counted as wrong: a failure of ours would
teach the model that its right answer was not.

A domain owns what its environments share (worker processes, a sandbox) and judges answers. One
environment plays one task; a domain whose tasks are one question and one answer needs no
environment of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from megatron_k2.errors import UserError
from megatron_k2.files import sha256_of_json
from megatron_k2.records.messages import Message, ToolSpec
from megatron_k2.records.read import tools_from

SCHEMA_VERSION = 1


class Outcome(StrEnum):
    """What is known of an answer."""

    RIGHT = "right"
    WRONG = "wrong"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Verdict:
    """Of one answer, with what it rests on."""

    outcome: Outcome
    evidence: str
    """For a person: what was compared, or why it is not known."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """For programs, JSON: verdicts of single tests or constraints."""
    seconds: float = 0.0
    """Wall seconds of the verification, waiting for a worker included."""

    @property
    def reward(self) -> float | None:
        """1 or 0; ``None`` where nothing is known, to be masked."""
        return {Outcome.RIGHT: 1.0, Outcome.WRONG: 0.0}.get(self.outcome)


def right(evidence: str, **details: Any) -> Verdict:
    """The answer is right."""
    return Verdict(Outcome.RIGHT, evidence, details)


def wrong(evidence: str, **details: Any) -> Verdict:
    """The answer is wrong."""
    return Verdict(Outcome.WRONG, evidence, details)


def unknown(evidence: str, **details: Any) -> Verdict:
    """The verifier could not tell."""
    return Verdict(Outcome.UNKNOWN, evidence, details)


@dataclass(frozen=True)
class Task:
    """One thing to do, as JSON lines hold it."""

    domain: str
    """Of the registry."""
    prompt: str
    reference: Mapping[str, Any]
    """What the domain's verifier needs, JSON; never shown to the model."""
    id: str = ""
    """Of its content where not given."""
    tools: tuple[ToolSpec, ...] = ()
    budget_tokens: int | None = None
    """Of an answer; ``None``: the run's."""
    difficulty: float | None = None
    """Share of a reference policy's answers that fail, 0 to 1; ``None``: not measured."""
    source: str = ""
    """The generator or set it is from."""

    def __post_init__(self) -> None:
        if not self.id:
            content = {"d": self.domain, "p": self.prompt, "r": dict(self.reference)}
            object.__setattr__(self, "id", sha256_of_json(content)[:16])

    def as_json(self) -> dict[str, Any]:
        """An object of a task set's line."""
        row = {name: value for name, value in vars(self).items() if value not in (None, (), "")}
        if self.tools:
            row["tools"] = [tool.value for tool in self.tools]
        return {"schema_version": SCHEMA_VERSION, **row, "reference": dict(self.reference)}


def task_from(row: Mapping[str, Any]) -> Task:
    """A line of a task set.

    Raises:
        ValueError: a field that is missing or of another type.
    """
    for name, kind in (("domain", str), ("prompt", str), ("reference", dict)):
        if not isinstance(row.get(name), kind):
            found = type(row.get(name)).__name__
            raise ValueError(f"{name} is {found}; expected a {kind.__name__}")
    if row.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        raise ValueError(f"schema_version {row['schema_version']}; expected {SCHEMA_VERSION}")
    names = ("id", "budget_tokens", "difficulty", "source")
    given = {name: row[name] for name in names if row.get(name) is not None}
    tools = tools_from(row.get("tools"))
    return Task(row["domain"], row["prompt"], row["reference"], tools=tools, **given)


@dataclass(frozen=True)
class Step:
    """What an environment answers to an action."""

    messages: tuple[Message, ...] = ()
    """That the policy reads next."""
    is_over: bool = False


class Environment(Protocol):
    """One episode of one task."""

    async def reset(self, task: Task) -> Step:
        """Begin; the messages are the first that the policy reads."""

    async def step(self, action: Message) -> Step:
        """What the policy said, to what it reads next."""

    async def verify(self) -> Verdict:
        """Judge the episode as it stands; it may be called once it is over, or cut off."""


class Domain(Protocol):
    """A kind of task, and its verifier."""

    name: str

    async def judge(self, task: Task, answer: str) -> Verdict:
        """Verify a single answer."""

    def environment(self) -> Environment:
        """For one episode."""

    async def close(self) -> None:
        """End worker processes and sandboxes."""


class Generator(Protocol):
    """A source of tasks that knows their answers."""

    name: str
    domain: str

    def sample(self, number: int, seed: int) -> Sequence[Task]:
        """The same tasks for the same seed."""

    def oracle(self, task: Task) -> str:
        """An answer that is right."""


class SingleTurn:
    """The environment of a question and its answer: all of it is the domain's ``judge``."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._task: Task | None = None
        self._answer = ""

    async def reset(self, task: Task) -> Step:
        """The prompt, as a user's message."""
        self._task, self._answer = task, ""
        return Step((Message(role="user", content=task.prompt),))

    async def step(self, action: Message) -> Step:
        """Takes the answer; the episode is over."""
        self._answer = action.content
        return Step(is_over=True)

    async def verify(self) -> Verdict:
        """The domain's verdict of the answer; of an empty one if there was none."""
        if self._task is None:
            raise UserError("verify before reset: the environment has no task")
        return await self._domain.judge(self._task, self._answer)
