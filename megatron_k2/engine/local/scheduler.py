"""Which rows go into the next step: slots, admission in flight, chunks of prompts, shared prefixes.

A slot keeps its tokens after their answer has ended. A new prompt that begins with tokens of some
slot takes their rows instead of computing them: in place where that slot is free (a dialogue's next
turn), by a copy where it is not (several samples of one prompt). Where the tokens' routes are asked
for they are taken along, so only as many rows as have theirs on record. The last token of a prompt
is always computed, since its logits are needed.
"""

import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from megatron_k2.engine.local.model import Chunk, Step
from megatron_k2.engine.local.sampling import Row, uniform
from megatron_k2.engine.protocol import Constraint, Request, Token
from megatron_k2.records.routes import Routes

MIN_SHARED = 16
"""Tokens below which a prefix is not worth a copy."""


@dataclass(eq=False)
class Sequence:
    """A request and how far it has come."""

    request: Request
    seed: int
    ids: list[int] = field(default_factory=list)
    """Prompt and answer."""
    slot: int = -1
    num_cached: int = 0
    prompt_tokens: list[Token] = field(default_factory=list)
    routes: list[Routes] = field(default_factory=list)
    """Of the first cached tokens, one by one: of all, where they are asked for."""
    held: list[Token] = field(default_factory=list)
    """Sampled, but not yet routed: not given out yet."""
    has_given_prompt: bool = False
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        self.ids = list(self.request.prompt)

    @property
    def num_new(self) -> int:
        """Tokens sampled so far."""
        return len(self.ids) - len(self.request.prompt)

    @property
    def num_open(self) -> int:
        """Tokens that are not cached; one while it decodes."""
        return len(self.ids) - self.num_cached

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether its logits are needed, of every token."""
        return self.request.params.prompt_logprobs is not None

    @property
    def is_routed(self) -> bool:
        """Whether each token's routes are asked for."""
        return self.request.params.returns_routed_experts

    def row(self) -> Row:
        """For the sampler."""
        allowed = None if self.constraint is None else self.constraint.allowed()
        draw = uniform(self.seed, len(self.ids))
        return Row(self.request.params, draw, self.ids, allowed)


def num_common(first: list[int], second: list[int]) -> int:
    """Tokens with which both begin."""
    length = min(len(first), len(second))
    if not length or first[0] != second[0]:
        return 0
    differs = np.flatnonzero(np.asarray(first[:length]) != np.asarray(second[:length]))
    return int(differs[0]) if len(differs) else length


class Scheduler:
    """Slots and who waits for them.

    Args:
        num_slots: sequences at once.
        step_tokens: most rows of a step; a prompt beyond that goes through in chunks.
        shares_prefixes: whether rows that are there are taken instead of computed again.
    """

    def __init__(self, num_slots: int, step_tokens: int, *, shares_prefixes: bool = True) -> None:
        self._step_tokens, self._shares_prefixes = step_tokens, shares_prefixes
        self.running: list[Sequence | None] = [None] * num_slots
        self.resident: list[list[int]] = [[] for _ in range(num_slots)]
        """Tokens whose rows lie in each slot, running or not."""
        self._routed: list[list[Routes]] = [[] for _ in range(num_slots)]
        """Routes of the first of them: the list that the slot's last sequence writes on."""
        self._last_use = [0] * num_slots
        self._clock = itertools.count(1)
        self.waiting: deque[Sequence] = deque()
        self.is_open = True
        """Whether those that wait may come in."""

    @property
    def going(self) -> list[Sequence]:
        """Those in slots, by slot."""
        return [sequence for sequence in self.running if sequence is not None]

    def admit(self) -> list[tuple[int, int, int]]:
        """Give free slots to those that wait, in their order.

        Returns:
            Prefixes to copy, in this order: source slot, target slot, tokens.
        """
        copies = []
        while self.waiting and self.is_open:
            free = [slot for slot, sequence in enumerate(self.running) if sequence is None]
            if not free:
                break
            sequence = self.waiting[0]
            source, shared = self._best_prefix(sequence)
            if self._is_coming(sequence, shared):
                break
            self.waiting.popleft()
            if source in free:
                target = source
            else:
                # The lowest of those that hold nothing, else the one longest out of use.
                target = min(free, key=lambda slot: (self._last_use[slot], slot))
                if shared:
                    copies.append((source, target, shared))
            self._place(sequence, source, target, shared)
        return copies

    def _may_share(self, sequence: Sequence) -> bool:
        return self._shares_prefixes and not sequence.needs_whole_prompt

    def _best_prefix(self, sequence: Sequence) -> tuple[int, int]:
        """The slot that holds most of a prompt's beginning, and how much; (-1, 0): none does."""
        if not self._may_share(sequence):
            return -1, 0
        best = (-1, 0)
        for slot, held in enumerate(self.resident):
            shared = min(num_common(held, sequence.ids), len(sequence.ids) - 1)
            if sequence.is_routed:
                shared = min(shared, len(self._routed[slot]))
            if shared >= MIN_SHARED and shared > best[1]:
                best = (slot, shared)
        return best

    def _is_coming(self, sequence: Sequence, shared: int) -> bool:
        """Whether a prompt that is being read will soon hold more of this one's beginning."""
        if not self._may_share(sequence):
            return False
        least = max(shared + 1, MIN_SHARED)
        return any(
            other.num_open > 1
            and (other.is_routed or not sequence.is_routed)
            and min(num_common(other.ids, sequence.ids), len(sequence.ids) - 1) >= least
            for other in self.going
        )

    def _place(self, sequence: Sequence, source: int, slot: int, shared: int) -> None:
        sequence.slot, sequence.num_cached = slot, shared
        sequence.routes = self._routed[source][:shared]
        self._routed[slot] = sequence.routes
        self.running[slot] = sequence
        self.resident[slot] = sequence.ids[:shared]
        self._last_use[slot] = next(self._clock)

    def plan(self) -> tuple[Step, list[Sequence], list[int]]:
        """Rows of the next step: who decodes, then who reads, and the tokens of all."""
        going = self.going
        decoding = [s for s in going if s.num_open == 1 and s.num_cached]
        room = max(1, self._step_tokens - len(decoding))
        reading, chunks = [], []
        for sequence in sorted(
            (s for s in going if s not in decoding), key=lambda s: self._last_use[s.slot]
        ):
            if room <= 0:
                break
            count = min(room, sequence.num_open)
            chunks.append(Chunk(sequence.slot, sequence.num_cached, count))
            reading.append(sequence)
            room -= count
        tokens = [s.ids[-1] for s in decoding]
        for sequence, chunk in zip(reading, chunks, strict=True):
            tokens += sequence.ids[chunk.start : chunk.start + chunk.count]
        step = Step([s.slot for s in decoding], [s.num_cached for s in decoding], chunks)
        return step, decoding + reading, tokens

    def cached(self, sequence: Sequence, count: int) -> None:
        """``count`` more tokens of a sequence lie in its slot."""
        begin = sequence.num_cached
        sequence.num_cached += count
        self.resident[sequence.slot] += sequence.ids[begin : begin + count]

    def release(self, sequence: Sequence) -> None:
        """Its slot is free; its rows stay until somebody needs the slot."""
        self.running[sequence.slot] = None
        self._last_use[sequence.slot] = next(self._clock)

    def remove(self, ids: Iterable[str] | None) -> list[Sequence]:
        """Take requests out, all of them for ``None``."""
        wanted = None if ids is None else set(ids)
        found = [
            s for s in [*self.going, *self.waiting] if wanted is None or s.request.id in wanted
        ]
        for sequence in found:
            if sequence.slot >= 0:
                self.release(sequence)
            else:
                self.waiting.remove(sequence)
        return found

    def forget(self) -> None:
        """Rows of old weights: nothing is resident, those that run are read again."""
        self.resident = [[] for _ in self.resident]
        for routes in self._routed:  # those of sequences that run among them
            routes.clear()
        for sequence in self.going:
            sequence.num_cached = 0
