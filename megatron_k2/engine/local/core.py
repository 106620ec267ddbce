"""The embedded engine without its thread: requests in, a step at a time, outputs out."""

import secrets
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from megatron_k2.engine.constrained import Grammars
from megatron_k2.engine.local.invariant import InvariantModel, whole_tiles
from megatron_k2.engine.local.model import LatentModel, Step
from megatron_k2.engine.local.sampling import choose, scored
from megatron_k2.engine.local.scheduler import Scheduler, Sequence
from megatron_k2.engine.local.weights import Weights
from megatron_k2.engine.protocol import Constraint, FinishReason, Limits, Output, Request, Token
from megatron_k2.engine.transfer.manifest import Manifest
from megatron_k2.errors import UserError
from megatron_k2.records.routes import Routes

STEP_TOKENS = 1024
"""Rows of a step, unless there are more slots: enough for large products, and a reader of a long
prompt makes others wait for no more than so many tokens."""
NO_GRAMMARS = "this engine was started without a tokenizer, so that it holds no answer to a grammar"
_GIB = 2**30


class Core:
    """Weights, slots, and the sequences in them.

    Args:
        weights: loaded.
        num_slots: sequences decoded at once.
        max_length: tokens of each, prompt and answer.
        version: of the weights.
        step_tokens: most rows of a step.
        memory_bytes: that weights and slots may take together.
        shares_prefixes: whether prompts take over rows that others have computed.
        is_batch_invariant: whether a request's tokens and log-probabilities are the same bits
            whatever else is computed; slower.
        grammars: what answers can be held to; None: to nothing.

    Raises:
        UserError: they do not fit.
    """

    def __init__(
        self,
        weights: Weights,
        *,
        num_slots: int,
        max_length: int,
        version: str = "0",
        step_tokens: int = STEP_TOKENS,
        memory_bytes: int | None = None,
        shares_prefixes: bool = True,
        is_batch_invariant: bool = False,
        grammars: Grammars | None = None,
    ) -> None:
        length = whole_tiles(max_length) if is_batch_invariant else max_length
        require_room(weights, num_slots, length, memory_bytes)
        self.weights, self.version, self.max_length = weights, version, max_length
        self._grammars = grammars
        model = InvariantModel if is_batch_invariant else LatentModel
        self._model = model(weights, num_slots, length)
        self._samples_apart = is_batch_invariant
        self.scheduler = Scheduler(
            num_slots, max(step_tokens, num_slots), shares_prefixes=shares_prefixes
        )

    @property
    def limits(self) -> Limits:
        """Fixed for the core's life."""
        return Limits(self.weights.preset.vocab_size, self.max_length, len(self.scheduler.running))

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.scheduler.waiting or self.scheduler.going)

    def add(self, request: Request) -> None:
        """Queue a request that ``protocol.check_request`` has passed.

        Raises:
            UserError: its answer cannot be held to its grammar.
        """
        seed = request.params.seed
        own = secrets.randbits(62) if seed is None else seed
        constraint = None if request.grammar is None else self.compiled(request.grammar)
        self.scheduler.waiting.append(Sequence(request, own, constraint=constraint))

    def compiled(self, grammar: str) -> Constraint:
        """What holds an answer to a grammar; from any thread.

        Raises:
            UserError: see ``Grammars.compiled``, or this core has none.
        """
        if self._grammars is None:
            raise UserError(NO_GRAMMARS)
        return self._grammars.compiled(grammar)

    def abort(self, ids: Iterable[str] | None) -> list[tuple[str, Output]]:
        """End requests; what was held of their answers comes with the end."""
        gone = self.scheduler.remove(ids)
        return [(s.request.id, Output(tuple(s.held), finish_reason="abort")) for s in gone]

    def update(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        version: str,
        manifest: Callable[[], Manifest] | None = None,
    ) -> None:
        """Replace every weight; sequences in flight are read again by the new ones.

        Raises:
            UserError: see ``Weights.load``; the weights are then a mixture.
            UpdateError: they are not what ``manifest`` says was sent.
        """
        self.weights.load(tensors)
        if manifest is not None:
            manifest().require_held(self.weights.held, version)
        self.adopt(version)

    def adopt(self, version: str) -> None:
        """Go on with weights that were replaced from outside."""
        self.version = version
        self.scheduler.forget()

    @torch.inference_mode()
    def step(self) -> list[tuple[str, Output]]:
        """Admit, compute one step, sample; outputs of the requests that got something."""
        for source, target, count in self.scheduler.admit():
            self._model.copy_prefix(source, target, count)
        step, members, ids = self.scheduler.plan()
        if not members:
            return []
        routes: list[Tensor] | None = None
        if any(s.is_routed for s in members):
            routes = []
        tokens = torch.tensor(ids, device=self.weights.device)
        hidden = self._model.forward(tokens, step, routes=routes)
        return self._settle(step, members, hidden, routes)

    def _settle(
        self, step: Step, members: list[Sequence], hidden: Tensor, routes: list[Tensor] | None
    ) -> list[tuple[str, Output]]:
        """Book a step's rows, and sample where a sequence is read to its end."""
        counts = [1] * len(step.slots) + [chunk.count for chunk in step.chunks]
        sent = Routes.of(torch.stack(routes, 1).cpu().numpy()) if routes else None
        begin, sampled, last_rows = 0, [], []
        for sequence, count in zip(members, counts, strict=True):
            rows = slice(begin, begin + count)
            if sequence.request.params.prompt_logprobs is not None:
                self._score_prompt(sequence, hidden[rows])
            self.scheduler.cached(sequence, count)
            if sent is not None and sequence.is_routed:
                sequence.routes += [sent[row : row + 1] for row in range(begin, begin + count)]
            begin += count
            if not sequence.num_open:
                sampled.append(sequence)
                last_rows.append(begin - 1)
        if not sampled:
            return []
        if not all(s.request.params.max_tokens for s in sampled):
            return self._sample_some(sampled, hidden[last_rows])
        return self._sample(sampled, hidden[last_rows])

    def _score_prompt(self, sequence: Sequence, hidden: Tensor) -> None:
        """Log-probabilities of the prompt's tokens that follow these rows."""
        ids, first = sequence.request.prompt, sequence.num_cached
        if first >= len(ids) or len(sequence.prompt_tokens) >= len(ids):
            return  # decoding, or read again after an update
        if not first:
            sequence.prompt_tokens = [Token(ids[0], None, (), self.version)]
        following = ids[first + 1 : first + 1 + len(hidden)]
        if following:
            num_top = sequence.request.params.prompt_logprobs or 0
            logits = self._model.logits(hidden[: len(following)])
            tops = [num_top] * len(following)
            sequence.prompt_tokens += self._scored(logits, torch.tensor(following), tops)

    def _scored(self, logits: Tensor, ids: Tensor, num_top: list[int]) -> list[Token]:
        """Of every row at once, or of each in the shape that it has alone."""
        size = 1 if self._samples_apart else max(1, len(ids))
        return [
            token
            for begin in range(0, len(ids), size)
            for part in [slice(begin, begin + size)]
            for token in scored(logits[part], ids[part], num_top[part], self.version)
        ]

    def _chosen(self, logits: Tensor, sequences: list[Sequence]) -> Tensor:
        """The same of the draws, [B] int64."""
        rows = [sequence.row() for sequence in sequences]
        if not self._samples_apart:
            return choose(logits, rows)
        alone = zip(logits.split(1), rows, strict=True)
        return torch.cat([choose(line, [row]) for line, row in alone])

    def _sample_some(self, sampled: list[Sequence], hidden: Tensor) -> list[tuple[str, Output]]:
        """Where some wanted their prompt scored and no token."""
        wanting = [i for i, s in enumerate(sampled) if s.request.params.max_tokens]
        outputs = []
        for sequence in (s for s in sampled if not s.request.params.max_tokens):
            self.scheduler.release(sequence)
            outputs.append((sequence.request.id, self._output(sequence, [], "length", None)))
        if wanting:
            outputs += self._sample([sampled[i] for i in wanting], hidden[wanting])
        return outputs

    def _sample(self, sampled: list[Sequence], hidden: Tensor) -> list[tuple[str, Output]]:
        logits = self._model.logits(hidden)
        ids = self._chosen(logits, sampled)
        wanted = [sequence.request.params.logprobs for sequence in sampled]
        outputs = []
        for sequence, token in zip(sampled, self._scored(logits, ids, wanted), strict=True):
            reason, stop = self._take(sequence, token)
            output = self._output(sequence, [token], reason, stop)
            if sequence.constraint is not None and sequence.constraint.fault:
                output = replace(output, fault=sequence.constraint.fault)
            if output.tokens or output.prompt_tokens or output.finish_reason:
                outputs.append((sequence.request.id, output))
        return outputs

    def _take(self, sequence: Sequence, token: Token) -> tuple[FinishReason | None, int | None]:
        """Append a sampled token; whether and by what it ends the answer."""
        params = sequence.request.params
        sequence.ids.append(token.id)
        if sequence.constraint is not None:
            sequence.constraint.accept(token.id)
        if token.id in params.stop_token_ids:
            self.scheduler.release(sequence)
            return "stop", token.id
        if sequence.num_new == params.max_tokens:
            self.scheduler.release(sequence)
            return "length", None
        return None, None

    def _output(
        self,
        sequence: Sequence,
        tokens: list[Token],
        reason: FinishReason | None,
        stop: int | None,
    ) -> Output:
        """What may be given out now: routed tokens once they have been an input."""
        if not sequence.is_routed:
            given = tuple(sequence.prompt_tokens) if not sequence.has_given_prompt else ()
            sequence.has_given_prompt = True
            return Output(tuple(tokens), given, reason, stop)
        return _routed_output(sequence, tokens, reason, stop, self.version)


def _routed_output(
    sequence: Sequence,
    tokens: list[Token],
    reason: FinishReason | None,
    stop: int | None,
    version: str,
) -> Output:
    """The same with each token's experts; a token waits here until it has been an input."""
    prompt: list[Token] = []
    if not sequence.has_given_prompt:
        sequence.has_given_prompt = True
        ids = sequence.request.prompt
        prompt = sequence.prompt_tokens or [Token(i, None, (), version) for i in ids]
        prompt = [_with_routes(token, sequence, place) for place, token in enumerate(prompt)]
    first = len(sequence.ids) - len(tokens) - len(sequence.held)
    ready = [_with_routes(t, sequence, first + i) for i, t in enumerate(sequence.held)]
    sequence.held = list(tokens)
    if reason:
        ready += sequence.held
        sequence.held = []
    return Output(tuple(ready), tuple(prompt), reason, stop)


def _with_routes(token: Token, sequence: Sequence, place: int) -> Token:
    routes = sequence.routes[place]
    return Token(token.id, token.logprob, token.top, token.weight_version, routes)


def require_room(
    weights: Weights, num_slots: int, max_length: int, memory_bytes: int | None
) -> None:
    """Refuse slots that cannot be held.

    Raises:
        UserError: with the arithmetic.
    """
    if num_slots < 1 or max_length < 2:
        raise UserError(
            f"{num_slots} slots of {max_length} tokens: expected 1 or more, of 2 or more"
        )
    p = weights.preset
    size = torch.empty((), dtype=weights.dtype).element_size()
    a_token = p.num_layers * (p.kv_lora_rank + p.qk_pos_emb_head_dim) * size
    cache = num_slots * max_length * a_token
    if memory_bytes is not None and weights.num_bytes + cache > memory_bytes:
        held, slots, allowed = (n / _GIB for n in (weights.num_bytes, cache, memory_bytes))
        raise UserError(
            f"weights {held:.3g} GiB and {num_slots} slots x {max_length} tokens x {a_token:,} "
            f"bytes = {slots:.3g} GiB are more than the {allowed:.3g} GiB allowed; take fewer "
            "or shorter slots"
        )
