"""Resources servers of NeMo-Gym over HTTP: their tools, their sessions, their verifiers.

``/seed_session`` begins an episode, ``/<tool>`` is called with a tool's arguments, ``/verify``
takes the row and a response in OpenAI's Responses form and gives a reward. A session is a cookie:
each episode has a jar of its own, and ends with it whatever happens. The row is kept whole in a
task's reference, since the verifier wants it back.
"""

import json
from collections.abc import Mapping
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.gym.judging import NotJudged
from megatron_k2.gym.protocol import Environment, Step, Task, Verdict, right, unknown, wrong
from megatron_k2.records.messages import Message
from megatron_k2.records.read import message_from, tools_from

NAME = "nemo_gym"
MOST_TURNS = 64


def task_of(row: Mapping[str, Any]) -> Task:
    """A line of their data as a task.

    Raises:
        ValueError: it has no ``responses_create_params`` with an input.
    """
    try:
        params = row["responses_create_params"]
        given = params["input"]
    except (KeyError, TypeError):
        raise ValueError("a row without responses_create_params.input") from None
    tools = tools_from(
        [{"type": "function", "function": _plain(t)} for t in params.get("tools") or ()]
    )
    prompt = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    return Task(NAME, prompt, {"row": dict(row)}, tools=tools, source=NAME)


def _plain(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tool[name] for name in ("name", "description", "parameters") if name in tool}


class NemoGym:
    """One of their servers.

    Args:
        url: ``http://host:port``.
        seconds: of one call.

    Raises:
        UserError: aiohttp is not installed.
    """

    name = NAME

    def __init__(self, url: str, seconds: float = 60.0) -> None:
        try:
            import aiohttp  # noqa: F401
        except ImportError:
            raise UserError("aiohttp is not installed; pip install 'megatron-k2[remote]'") from None
        self._url, self._seconds = url.rstrip("/"), seconds

    async def judge(self, task: Task, answer: str) -> Verdict:
        """Verify a single answer, in a session of its own."""
        episode = _Episode(self._url, self._seconds)
        try:
            await episode.reset(task)
            await episode.step(Message("assistant", answer))
            return await episode.verify()
        except NotJudged as problem:
            await episode.end()
            return unknown(str(problem))

    def environment(self) -> Environment:
        """Of turns: calls go to their tools, a turn without calls ends it."""
        return _Episode(self._url, self._seconds)

    async def close(self) -> None:
        """Sessions end with their episodes."""


class _Episode:
    """A session; it is closed by ``verify``, and by every failure."""

    def __init__(self, url: str, seconds: float) -> None:
        self._url, self._seconds = url, seconds
        self._session: Any = None
        self._row: dict[str, Any] = {}
        self._output: list[dict[str, Any]] = []
        self._num_turns = 0

    async def reset(self, task: Task) -> Step:
        import aiohttp

        await self.end()
        self._row, self._output, self._num_turns = dict(task.reference["row"]), [], 0
        self._session = aiohttp.ClientSession(
            cookie_jar=aiohttp.CookieJar(unsafe=True),  # addresses without a name, too
            timeout=aiohttp.ClientTimeout(total=self._seconds),
        )
        await self._post("seed_session", self._row)
        given = self._row["responses_create_params"]["input"]
        if isinstance(given, str):
            return Step((Message("user", given),))
        return Step(tuple(message_from(_message(each)) for each in given))

    async def step(self, action: Message) -> Step:
        self._num_turns += 1
        if action.content:
            self._output.append(_said(action.content))
        answers = []
        for call in action.tool_calls:
            text = await self._called(call.name, call.arguments)
            self._output += [
                {
                    "type": "function_call", "call_id": call.id, "name": call.name,
                    "arguments": call.arguments, "id": call.id, "status": "completed",
                },
                {"type": "function_call_output", "call_id": call.id, "output": text},
            ]  # fmt: skip
            answers.append(Message("tool", text, name=call.name, tool_call_id=call.id))
        return Step(tuple(answers), not action.tool_calls or self._num_turns >= MOST_TURNS)

    async def verify(self) -> Verdict:
        try:
            found = await self._post("verify", {**self._row, "response": self._response()})
        finally:
            await self.end()
        reward = found.get("reward")
        if isinstance(reward, bool) or not isinstance(reward, int | float):
            return unknown(f"their verifier gave the reward {reward!r}")
        known = ("responses_create_params", "response", *self._row)
        details = {name: value for name, value in found.items() if name not in known}
        verdict = right if reward == 1 else wrong
        return verdict(f"their reward is {reward:g}", **details)

    async def end(self) -> None:
        """Close the session, whatever it is in."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _response(self) -> dict[str, Any]:
        params = self._row["responses_create_params"]
        return {
            "id": "response", "created_at": 0, "model": "policy", "object": "response",
            "parallel_tool_calls": True, "tool_choice": "auto", "tools": params.get("tools") or [],
            "status": "completed", "output": self._output,
        }  # fmt: skip

    async def _called(self, name: str, arguments: str) -> str:
        """A tool's answer; what the policy got wrong is an answer too, and no failure."""
        known = {
            tool.get("name") for tool in self._row["responses_create_params"].get("tools") or ()
        }
        if name not in known:
            return json.dumps({"error": f"no tool {name!r}"})
        try:
            given = json.loads(arguments)
        except ValueError as problem:
            return json.dumps({"error": f"arguments are no JSON: {problem}"})
        return json.dumps(await self._post(name, given), ensure_ascii=False)

    async def _post(self, path: str, body: Any) -> Any:
        try:
            async with self._session.post(f"{self._url}/{path}", json=body) as answer:
                text = await answer.text()
                if answer.status == 422 and path not in ("seed_session", "verify"):
                    return {"error": text[:2000]}
                if answer.status != 200:
                    raise NotJudged(f"/{path} answered {answer.status}: {text[:200]}")
                return json.loads(text)
        except NotJudged:
            await self.end()
            raise
        except Exception as problem:  # of the connection, or no JSON
            await self.end()
            raise NotJudged(f"/{path}: {type(problem).__name__}: {problem}"[:300]) from None


def _message(given: Mapping[str, Any]) -> dict[str, Any]:
    content = given.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content)
    return {
        "role": "system" if given.get("role") == "developer" else given.get("role"),
        "content": content,
    }


def _said(text: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": []}
    return {
        "id": "message", "type": "message", "role": "assistant", "status": "completed",
        "content": [part],
    }  # fmt: skip
