"""A dialogue that grows: what is written stays, so a longer one begins with the shorter one's ids.

That is what reinforcement learning over several turns stands on. A turn the model sampled is kept
by its own ids; decoding it and encoding it again gives others now and then.
"""

from collections.abc import Sequence

from megatron_k2.chat.control import IM_END
from megatron_k2.chat.template import Rendered, Renderer, generation_prompt, opening, turn
from megatron_k2.records.messages import Message, ToolSpec


class Dialogue:
    """Ids and loss mask of the turns so far.

    Args:
        renderer: Tokenizer and template.
        tools: Declared before the first turn; they cannot change later.
    """

    def __init__(self, renderer: Renderer, tools: Sequence[ToolSpec] = ()) -> None:
        self._renderer, self._tools = renderer, tuple(tools)
        self._is_open = False
        self._rendered = Rendered()

    @property
    def ids(self) -> tuple[int, ...]:
        """Of all turns so far."""
        return tuple(self._rendered.ids)

    @property
    def loss_mask(self) -> tuple[int, ...]:
        """1 where the token at the same place is a target."""
        return tuple(self._rendered.loss_mask)

    def append(self, message: Message) -> None:
        """Write a turn.

        Raises:
            UserError: see ``template.turn``.
        """
        pieces = turn(message, self._renderer.form)
        self._open(message)
        self._renderer.extend(self._rendered, pieces)

    def prompt(self) -> tuple[int, ...]:
        """What a model is asked to continue; ``ids`` with it once the answer is appended."""
        asked = Rendered(list(self._rendered.ids), list(self._rendered.loss_mask))
        self._renderer.extend(asked, generation_prompt())
        return tuple(asked.ids)

    def append_sampled(self, ids: Sequence[int]) -> None:
        """Write the model's answer to ``prompt()``, id by id.

        Args:
            ids: As sampled. What follows the first ``<|im_end|>`` is not part of the turn; where
                there is none (a length limit), one is added that nobody is trained on.
        """
        end = self._renderer.control.by_name[IM_END]
        sampled = list(ids)
        is_ended = end in sampled
        if is_ended:
            sampled = sampled[: sampled.index(end) + 1]
        self._open(Message("assistant"))
        self._renderer.extend(self._rendered, generation_prompt())
        self._rendered.ids.extend(sampled)
        self._rendered.loss_mask.extend([1] * len(sampled))
        if not is_ended:
            self._rendered.ids.append(end)
            self._rendered.loss_mask.append(0)

    def _open(self, first: Message) -> None:
        if not self._is_open:
            pieces = opening(first, self._tools, self._renderer.form)
            self._renderer.extend(self._rendered, pieces)
            self._is_open = True
