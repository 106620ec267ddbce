"""``EndpointPolicy``: a model behind ``/v1/chat/completions`` plays a gym's episodes."""

from typing import TYPE_CHECKING, Any

from megatron_k2.engine.protocol import EngineError
from megatron_k2.gym.episode import Action, View
from megatron_k2.records.read import message_from

if TYPE_CHECKING:
    from megatron_k2.engine.remote.client import Client


class EndpointPolicy:
    """Speaks messages and tools; token ids stay with the server.

    Args:
        client: of the model's endpoints.
        model: as they call it.
        temperature: of its answers.
        max_tokens: of one turn, where the task has no budget or a larger one.
        seed: of this episode's turns; ``None``: the server draws one.
    """

    def __init__(
        self,
        client: "Client",
        model: str,
        *,
        temperature: float = 1.0,
        max_tokens: int = 4096,
        seed: int | None = None,
    ) -> None:
        self._client, self._seed, self._max_tokens = client, seed, max_tokens
        self._body = {"model": model, "temperature": temperature}

    async def __call__(self, view: View) -> Action:
        """The next turn.

        Raises:
            EngineError: the endpoint does not answer, or not as OpenAI does.
        """
        left = view.num_tokens_left
        body: dict[str, Any] = {
            **self._body,
            "messages": [message.to_object() for message in view.messages],
            "max_tokens": self._max_tokens if left is None else min(left, self._max_tokens),
        }
        if self._seed is not None:
            body["seed"] = self._seed + len(view.messages)
        if view.tools:
            body["tools"] = [tool.value for tool in view.tools]
        answer = await self._client.post("/v1/chat/completions", body)
        try:
            said = dict(answer["choices"][0]["message"])
            return Action(
                message_from({"role": "assistant", **said, "content": said.get("content") or ""})
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise EngineError(f"the model's answer is not OpenAI's: {error!r}") from None
