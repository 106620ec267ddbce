"""What a chat's body says its answer must be: a grammar, or nothing."""

from collections.abc import Sequence

from megatron_k2.engine.grammar import calls_grammar, values_grammar
from megatron_k2.engine.server.bodies import ChatBody, NamedTool
from megatron_k2.engine.server.service import Service
from megatron_k2.errors import UserError
from megatron_k2.records.messages import Message, ToolSpec


def _chosen(body: ChatBody, tools: Sequence[ToolSpec]) -> Sequence[ToolSpec]:
    """Tools that ``tool_choice`` leaves.

    Raises:
        UserError: it names none of them, or there are none to choose from.
    """
    choice = body.tool_choice
    if choice in (None, "auto", "none"):
        return tools
    found, wanted = tools, "a call"
    if isinstance(choice, NamedTool):
        found = [tool for tool in tools if tool.name == choice.function.name]
        wanted = f"function {choice.function.name!r}"
    if not found:
        raise UserError(f"tool_choice: {wanted} is wanted, but tools declares none such")
    return found


def grammar_of(
    service: Service, body: ChatBody, messages: Sequence[Message], tools: Sequence[ToolSpec]
) -> str | None:
    """What the answer is held to; free text where nothing was asked for.

    Under ``auto``, calls are held to their schemas where a tool says ``strict``.

    Raises:
        UserError: both a call and a form of answer are asked for, or see ``engine/grammar.py``.
    """
    is_forced = body.tool_choice not in (None, "auto", "none")
    is_strict = any(tool.function.get("strict") is True for tool in tools)
    wanted = body.response_format
    if wanted is not None and wanted.type != "text":
        if is_forced or is_strict:
            raise UserError("response_format: not together with forced or strict tool calls")
        if wanted.type == "json_schema" and wanted.json_schema is None:
            raise UserError("response_format: json_schema is missing")
        schema = {"type": "object"} if wanted.json_schema is None else wanted.json_schema.schema_
        return values_grammar(schema)
    if not is_forced and not is_strict:
        return None
    return calls_grammar(
        _chosen(body, tools),
        service.renderer.control.by_name,
        sum(len(message.tool_calls) for message in messages),
        is_parallel=body.parallel_tool_calls is not False,
        may_talk=not is_forced,
    )
