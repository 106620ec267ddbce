"""Dialogues with tools as they lie between stages: ``Message``, ``ToolCall``, ``ToolSpec``.

The fields are OpenAI's, which is what public data and servers speak; ``records/read.py`` makes
records of their JSON. Everything in a record is data from elsewhere: text stays text, and nothing
here knows a control token.
"""

import functools
import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

from megatron_k2.files import sha256_of_json

SCHEMA_VERSION = 1
Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True)
class ToolCall:
    """One call an assistant makes."""

    id: str
    """K2's is ``functions.{name}:{index}``, the index counting all calls of the dialogue."""
    name: str
    arguments: str = "{}"
    """JSON as text, kept letter by letter: what the model wrote is what it is trained on."""

    def to_object(self) -> dict[str, Any]:
        """OpenAI's form."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True, eq=False)
class ToolSpec:
    """A tool that may be called; two are equal where their JSON is, whatever the order of its keys.

    Args:
        declaration: OpenAI's object ``{"type": "function", "function": {"name": …}}`` as JSON. Keys
            keep their order and unknown ones stay: a template prints the object whole.
    """

    declaration: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ToolSpec) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.name)

    @functools.cached_property
    def value(self) -> dict[str, Any]:
        """The declaration, parsed; not to be changed."""
        return json.loads(self.declaration)

    @property
    def function(self) -> dict[str, Any]:
        """Its ``function``: name, description, parameters as JSON schema."""
        return self.value["function"]

    @property
    def name(self) -> str:
        """What a call names."""
        return self.function["name"]


@dataclass(frozen=True)
class Message:
    """One turn.

    Raises:
        ValueError: a field that this role has no use for, or one that it lacks.
    """

    role: Role
    content: str = ""
    """Text; a list of text parts is joined where it is read."""
    name: str | None = None
    """Who speaks, where that is not the role itself: ``""`` and the role's own name become none."""
    tool_calls: tuple[ToolCall, ...] = ()
    """An assistant's."""
    tool_call_id: str | None = None
    """Which call a tool answers."""
    reasoning: str | None = None
    """An assistant's thoughts (``reasoning_content``); K2-Instruct's templates do not print it."""
    is_trained: bool = True
    """Whether an assistant's turn is a target; OpenAI's ``weight`` 0 makes it context only."""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role {self.role!r}: expected one of {', '.join(ROLES)}")
        if self.name in ("", self.role):
            object.__setattr__(self, "name", None)
        if self.role != "assistant" and (self.tool_calls or self.reasoning is not None):
            raise ValueError(f"a {self.role} message has tool_calls or reasoning_content; only an "
                             "assistant's may")  # fmt: skip
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError(
                "a tool message without tool_call_id; name the call that it answers"
                if self.role == "tool"
                else f"a {self.role} message has tool_call_id; only a tool's may"
            )

    def to_object(self) -> dict[str, Any]:
        """OpenAI's form; fields at their default are left out."""
        found: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.name is not None:
            found["name"] = self.name
        if self.tool_calls:
            found["tool_calls"] = [call.to_object() for call in self.tool_calls]
        if self.tool_call_id is not None:
            found["tool_call_id"] = self.tool_call_id
        if self.reasoning is not None:
            found["reasoning_content"] = self.reasoning
        if not self.is_trained:
            found["weight"] = 0
        return found


@dataclass(frozen=True)
class ChatSample:
    """A dialogue to train on.

    Raises:
        ValueError: no message, or a weight that is not a positive number.
    """

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    id: str = ""
    """Stable name; the content hash where none was given."""
    weight: float = 1.0
    """Multiplies the loss of its tokens."""
    source: str = ""
    """Where it is from, for counting; no stage reads it otherwise."""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if not self.messages:
            raise ValueError("no messages; a sample needs at least one")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight {self.weight}: expected a positive number")
        if not self.id:
            object.__setattr__(self, "id", self.content_hash)

    @functools.cached_property
    def content_hash(self) -> str:
        """sha256 over messages and tools: equal for two samples that train the same thing."""
        return sha256_of_json(
            [[m.to_object() for m in self.messages], [t.value for t in self.tools]]
        )

    def to_object(self) -> dict[str, Any]:
        """What stands on its line."""
        return {
            "schema_version": self.schema_version,
            "id": self.id,
            "messages": [message.to_object() for message in self.messages],
            "tools": [tool.value for tool in self.tools],
            "weight": self.weight,
            "source": self.source,
        }

    def to_line(self) -> str:
        """One JSON line, its end included."""
        return json.dumps(self.to_object(), ensure_ascii=False) + "\n"
