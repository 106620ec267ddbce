"""Answers held to a grammar while they are sampled, by llguidance (MIT).

Chosen over xgrammar (Apache-2.0) by measurement (``benchmarks/token_masks.py``) and because it
needs nothing else installed. It says no to what it does not enforce, instead of passing over it.
"""

import functools
import importlib.util
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from megatron_k2.chat.control import IM_END, control_ids
from megatron_k2.data.tokenizer import Tokenizer
from megatron_k2.errors import UserError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_KEPT = 16
"""Grammars of the last requests: choices of one body, and requests alike, compile once."""


class GrammarConstraint:
    """One answer's ``protocol.Constraint``.

    Args:
        matcher: at the answer's beginning.
        vocab_size: rows of the model's head; those beyond the tokenizer's ids are never allowed.
        end_id: the token that ends an answer.
    """

    def __init__(self, matcher: "LLMatcher", vocab_size: int, end_id: int) -> None:
        self._matcher, self._vocab_size, self._end_id = matcher, vocab_size, end_id
        self.fault = ""
        """Why the grammar was given up; the answer was ended there."""

    def fresh(self) -> Self:
        """The same for another answer."""
        return type(self)(self._matcher.deep_copy(), self._vocab_size, self._end_id)

    def allowed(self) -> Tensor:
        """See the protocol."""
        bias = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        allowed = torch.zeros(self._vocab_size, dtype=torch.bool)
        allowed[: len(bias)] = bias != 0
        if self._matcher.is_error():
            self.fault = self._matcher.get_error().partition("\n")[0]
        elif not allowed.any():
            self.fault = "nothing may follow"
        if self.fault:
            allowed = torch.zeros_like(allowed)
            allowed[self._end_id] = True
        return allowed

    def accept(self, token: int) -> None:
        """See the protocol."""
        if not self.fault and not self._matcher.consume_token(token):
            self.fault = self._matcher.get_error().partition("\n")[0]


class Grammars:
    """Compiles grammars for one vocabulary. Pickled as it was made, for another process.

    Args:
        load: gives the tokenizer, whose ids' bytes are what letters of a grammar are matched with;
            asked with the first grammar.
        vocab_size: rows of the model's head.
    """

    def __init__(self, load: Callable[[], Tokenizer], vocab_size: int) -> None:
        self._load, self._vocab_size = load, vocab_size
        self._kept: dict[str, GrammarConstraint] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Grammars, (self._load, self._vocab_size)

    def compiled(self, grammar: str) -> GrammarConstraint:
        """A constraint at an answer's beginning; from any thread. The last few are kept compiled.

        Args:
            grammar: of ``engine/grammar.py``.

        Raises:
            UserError: it is wrong, cannot be met, or asks for what is not enforced; llguidance is
                not installed, or the tokenizer's tokens are not bytes, or none ends a turn.
        """
        with self._lock:
            found = self._kept.get(grammar)
        found = found or self._anew(grammar)
        with self._lock:
            self._kept[grammar] = found
            if len(self._kept) > _KEPT:
                del self._kept[next(iter(self._kept))]
            return found.fresh()

    def _anew(self, grammar: str) -> GrammarConstraint:
        tokenizer, end_id = self._vocabulary
        from llguidance import LLMatcher

        matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0)
        if matcher.is_error():
            said = matcher.get_error().partition("\n")[0].rpartition("JSON schema: ")[2]
            raise UserError(f"a schema cannot be enforced: {said[:300]}")
        found = GrammarConstraint(matcher, self._vocab_size, end_id)
        found.fresh().allowed()
        return found

    @functools.cached_property
    def _vocabulary(self) -> "tuple[LLTokenizer, int]":
        """As llguidance has it, and the token that may come where an answer may end."""
        if importlib.util.find_spec("llguidance") is None:
            raise UserError(
                "schemas and forced tool calls need llguidance, which is not installed here; "
                "pip install 'megatron-k2[grammar]'"
            )
        from llguidance import LLTokenizer, TokenizerWrapper

        tokenizer = self._load()
        end_id = control_ids(tokenizer).by_name[IM_END]
        described = _Described(tokenizer, self._vocab_size, end_id)
        return LLTokenizer(TokenizerWrapper(described)), end_id


class _Described:
    """A tokenizer as llguidance asks for it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = end_id, None
        self.tokens = tokenizer.token_bytes()[:vocab_size]
        self.special_token_ids = sorted(i for i in tokenizer.special_ids.values() if i < vocab_size)

    def __call__(self, text: Any) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode())
