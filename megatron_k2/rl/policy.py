"""The policy that is trained, as an episode's: an engine behind K2's chat format, by token ids.

What was drawn stays as it was drawn: a turn's prompt is all ids before it and the new turns of the
environment, so every prompt begins with the one before it. Messages are made from the ids, for the
environment to read, and never the other way.

A turn counts as K2 writes it or not at all: where the strict parser refuses it, or it was cut off,
it is text, and calls nothing.
"""

import contextlib
import hashlib
import itertools
from dataclasses import dataclass
from typing import Protocol

from megatron_k2.chat.completion import FormatError, parse_completion
from megatron_k2.chat.control import IM_END
from megatron_k2.chat.dialogue import Dialogue
from megatron_k2.chat.lexer import IdLexer
from megatron_k2.chat.template import Renderer
from megatron_k2.engine.protocol import Engine, EngineError, Output, Request, SamplingParams
from megatron_k2.errors import UserError
from megatron_k2.gym.episode import Action, View
from megatron_k2.records.messages import Message, ToolSpec
from megatron_k2.records.rollouts import Sampled
from megatron_k2.rl.transcript import Origin, Transcript


class Meter(Protocol):
    """How far an answer may go for now."""

    def num_left(self) -> float:
        """Tokens; 0 or less: none."""

    def draw(self, number: int) -> None:
        """So many were drawn."""


class Unmetered:
    """As far as its budget goes."""

    def num_left(self) -> float:
        """No end."""
        return float("inf")

    def draw(self, number: int) -> None:
        """Not counted."""


class CutOff(Exception):  # noqa: N818 - what happened
    """The iteration is over for this answer; it is resumed in the next."""


class Replayed(Exception):  # noqa: N818 - what happened
    """The environment said something else than when the answer's beginning was played."""


@dataclass(frozen=True)
class Speaker:
    """What all policies of a run share."""

    engine: Engine
    renderer: Renderer
    seed: int
    """Of the run."""
    returns_routed_experts: bool = False

    def request_seed(self, name: str, place: int) -> int:
        """Of one request: of the run, the answer, and the place at which it goes on.

        The place is in it for engines whose draws count from a request's beginning: an answer that
        is resumed would else draw the numbers of its beginning again. 31 bits, which servers take.
        """
        digest = hashlib.sha256(f"{self.seed}/{name}/{place}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1


class EnginePolicy:
    """One answer.

    Args:
        speaker: engine, format, seed.
        name: of the answer in the run; requests are named by it.
        temperature: 0 is greedy, which no ``Segment`` holds.
        transcript: its beginning, where it is resumed; it is written on.
        meter: when it is cut off.
    """

    def __init__(
        self,
        speaker: Speaker,
        name: str,
        temperature: float,
        transcript: Transcript | None = None,
        meter: Meter | None = None,
    ) -> None:
        self._speaker, self._name, self._temperature = speaker, name, temperature
        self.transcript = transcript or Transcript()
        self._meter = meter or Unmetered()
        self._end = speaker.renderer.control.by_name[IM_END]
        self._dialogue: Dialogue | None = None
        self._num_heard = self._turn = 0
        self.is_cut_off = False
        self.is_out_of_tokens = False
        """Whether its last turn ended with the tokens that it had."""
        self.num_format_errors = 0
        """Turns that were whole, and are not what K2 writes."""
        self.engine_error: EngineError | None = None

    async def __call__(self, view: View) -> Action:
        """The next turn: a recorded one again, the rest of one, or a new one.

        Raises:
            CutOff: the iteration is over for this answer.
            Replayed: see there.
            UserError: the prompt fills the engine's slot, or versions are no numbers.
            EngineError: the engine failed.
        """
        self._hear(view)
        left = self._num_left(view)
        if not self._is_whole and left > 0:
            await self._draw(left)
        elif not self.transcript.num_sampled:
            raise UserError(
                f"a prompt of {len(self.transcript.ids)} tokens leaves none for an answer: the "
                f"engine's slots hold {self._speaker.engine.limits.max_length}; make them longer"
            )
        self.is_out_of_tokens = not self._is_whole
        ids = self.transcript.drawn(self._turn)
        assert self._dialogue is not None
        self._dialogue.append_sampled(ids)
        self._turn += 1
        self._num_heard = len(view.messages) + 1
        return Action(self._message(ids, view.tools), Sampled(tuple(ids)))

    @property
    def _is_whole(self) -> bool:
        """Whether the turn was closed by the policy, or is not its last."""
        drawn = self.transcript.drawn(self._turn)
        is_past = self._turn + 1 < len(self.transcript.turns)
        return is_past or bool(drawn and drawn[-1] == self._end)

    def _num_left(self, view: View) -> int:
        """Tokens that the turn may still draw, by the task's budget and the engine's slot."""
        room = self._speaker.engine.limits.max_length - len(self.transcript.ids)
        if view.num_tokens_left is None:
            return room
        return min(room, view.num_tokens_left - len(self.transcript.drawn(self._turn)))

    def _hear(self, view: View) -> None:
        """Write the environment's new turns, or compare them with those that were recorded."""
        if self._dialogue is None:
            self._dialogue = Dialogue(self._speaker.renderer, view.tools)
        for message in view.messages[self._num_heard :]:
            self._dialogue.append(message)
        prompt, transcript = list(self._dialogue.prompt()), self.transcript
        if self._turn < len(transcript.turns):
            if transcript.ids[: transcript.drawings[self._turn]] != prompt:
                raise Replayed(f"turn {self._turn + 1} of {len(transcript.turns)} is another")
            return
        known = len(transcript.ids)
        if prompt[:known] != transcript.ids:
            raise RuntimeError("a prompt that does not begin with the one before it")
        transcript.read(prompt[known:])

    async def _draw(self, left: int) -> None:
        """Draw the turn, or its rest, into the transcript."""
        due = self._meter.num_left()
        if due <= 0:
            self._cut_off()
        request = self._request(int(min(left, due)))
        num_before, reason = len(self.transcript.ids), None
        try:
            async with contextlib.aclosing(self._speaker.engine.generate(request)) as outputs:
                async for output in outputs:
                    self._take(output)
                    reason = output.finish_reason
                    if reason is None and self._meter.num_left() <= 0:
                        break
        except EngineError as problem:
            self.engine_error = problem
            raise
        if self._is_whole or len(self.transcript.ids) - num_before == left:
            return
        if reason == "abort":
            self.engine_error = EngineError(f"the engine ended the request {request.id}")
            raise self.engine_error
        self._cut_off()

    def _cut_off(self) -> None:
        self.is_cut_off = True
        raise CutOff

    def _request(self, max_tokens: int) -> Request:
        place = len(self.transcript.ids)
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=self._temperature,
            stop_token_ids=(self._end,),
            seed=self._speaker.request_seed(self._name, place),
            returns_routed_experts=self._speaker.returns_routed_experts,
        )
        return Request(f"{self._name}/{place}", tuple(self.transcript.ids), params)

    def _take(self, output: Output) -> None:
        if output.prompt_tokens:
            self.transcript.fill_routes(token.routed_experts for token in output.prompt_tokens)
        for version, tokens in itertools.groupby(output.tokens, lambda token: token.weight_version):
            self.transcript.draw(list(tokens), Origin(_number(version), self._temperature))
        self._meter.draw(len(output.tokens))

    def _message(self, ids: list[int], tools: tuple[ToolSpec, ...]) -> Message:
        """What the environment reads of a turn."""
        tokenizer = self._speaker.renderer.tokenizer
        try:
            return parse_completion(IdLexer(tokenizer), ids, "strict", tools).to_message()
        except FormatError:
            is_closed = bool(ids) and ids[-1] == self._end
            self.num_format_errors += is_closed
            return Message("assistant", tokenizer.decode(ids[:-1] if is_closed else ids))


def _number(version: str) -> int:
    """The trainer's: an integer.

    Raises:
        UserError: it is none.
    """
    try:
        return int(version)
    except ValueError:
        raise UserError(
            f"weights of version {version!r}; expected the number of optimizer steps "
            "behind them: give the engine str(number) with its weights"
        ) from None
