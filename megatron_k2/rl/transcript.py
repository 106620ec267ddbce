"""One answer's token ids as they grow: what was read, what was drawn, never rendered anew.

It lies in a ledger as ``Segment``s: each that was read begins a turn, and what was drawn after it
is that turn's, a segment for each version and temperature. An answer that was cut off is resumed
from them: its actions are played again, its last turn goes on where it ended.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

from megatron_k2.engine.protocol import Token
from megatron_k2.errors import UserError
from megatron_k2.records.routes import NO_ROUTES, Routes
from megatron_k2.rl.record import Segment

_READ = (-1, 1.0)
"""Version and temperature of what nobody drew."""


class Origin(NamedTuple):
    """Of a drawn token."""

    version: int
    temperature: float


@dataclass
class Transcript:
    """Ids, and for each what is known of it."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """0 for what was read."""
    origins: list[tuple[int, float]] = field(default_factory=list)
    routes: list[Routes | None] = field(default_factory=list)
    """Of one token each; ``None`` where it is not known."""
    turns: list[int] = field(default_factory=list)
    """Places at which a turn's reading begins."""
    drawings: list[int] = field(default_factory=list)
    """Places at which its drawing begins."""

    @classmethod
    def of(cls, segments: Iterable[Segment]) -> "Transcript":
        """What segments hold."""
        found = cls()
        for segment in segments:
            if not segment.is_sampled:
                found.read(segment.token_ids)
            else:
                origin = Origin(segment.weight_version, segment.temperature)
                found._add(segment.token_ids, segment.logprobs, origin)
            first = len(found.ids) - len(segment.token_ids)
            found.routes[first : first + len(segment.routes)] = segment.routes
        return found

    @property
    def num_sampled(self) -> int:
        """Tokens that were drawn."""
        return sum(origin != _READ for origin in self.origins)

    def read(self, ids: Sequence[int]) -> None:
        """Begin a turn."""
        self.turns.append(len(self.ids))
        self.ids += ids
        self.logprobs += [0.0] * len(ids)
        self.origins += [_READ] * len(ids)
        self.routes += [None] * len(ids)
        self.drawings.append(len(self.ids))

    def draw(self, tokens: Sequence[Token], origin: Origin) -> None:
        """Append tokens of the policy.

        Args:
            tokens: with their log-probabilities.
            origin: of all of them.

        Raises:
            UserError: one has none.
        """
        logprobs = [each.logprob for each in tokens if each.logprob is not None]
        if len(logprobs) < len(tokens):
            raise UserError("a token came without its log-probability; RL needs it")
        self._add([each.id for each in tokens], logprobs, origin)
        self.routes[len(self.routes) - len(tokens) :] = [each.routed_experts for each in tokens]

    def _add(self, ids: Sequence[int], logprobs: Sequence[float], origin: Origin) -> None:
        self.ids += ids
        self.logprobs += logprobs
        self.origins += [(origin.version, origin.temperature)] * len(ids)
        self.routes += [None] * len(ids)

    def drawn(self, turn: int) -> list[int]:
        """Ids that a turn drew; turn -1 is the last."""
        turn %= len(self.turns)
        end = self.turns[turn + 1] if turn + 1 < len(self.turns) else len(self.ids)
        return self.ids[self.drawings[turn] : end]

    def fill_routes(self, routes: Iterable[Routes | None]) -> None:
        """Routes of all tokens that have been an input, by the engine's last reading of them.

        An answer that is resumed is read again by newer weights, and what they draw then hangs on
        where *they* sent its beginning: with the routes of the weights before, a trainer's
        log-probabilities of the new tokens were off by up to 0.6 nats.
        """
        for place, found in enumerate(routes):
            if found is not None:
                self.routes[place] = found

    def segments(self) -> tuple[Segment, ...]:
        """For a ledger or a trainer; an answer that never had a prompt begins with an empty one."""
        places = sorted({*self.turns, *self.drawings, *self._changes(), len(self.ids)})
        found = [self._segment(begin, end) for begin, end in pairwise(places)]
        return tuple(found) or (Segment(()),)

    def _changes(self) -> list[int]:
        pairs = zip(self.origins, self.origins[1:], strict=False)
        return [place for place, (one, other) in enumerate(pairs, start=1) if one != other]

    def _segment(self, begin: int, end: int) -> Segment:
        known = [routes for routes in self.routes[begin:end] if routes is not None]
        version, temperature = self.origins[begin]
        return Segment(
            tuple(self.ids[begin:end]),
            tuple(self.logprobs[begin:end]) if version >= 0 else (),
            version,
            temperature,
            Routes.joined(known) if end - begin - len(known) in (0, 1) else NO_ROUTES,
        )


def cut_to(segments: Sequence[Segment], num_sampled: int) -> tuple[Segment, ...]:
    """An answer's beginning with so many drawn tokens; nothing that was read after them.

    It is the same however far the answer had gone on, so its last token has no routes, and an
    answer of which nothing was drawn has nothing at all.
    """
    found: list[Segment] = []
    left = num_sampled
    for segment in segments:
        if left <= 0:
            break
        count = len(segment.token_ids)
        if segment.is_sampled:
            count = min(count, left)
            left -= count
        is_last = segment.is_sampled and not left
        found.append(
            replace(
                segment,
                token_ids=segment.token_ids[:count],
                logprobs=segment.logprobs[:count],
                routes=segment.routes[: count - 1 if is_last else count],
            )
        )
    return tuple(found)
