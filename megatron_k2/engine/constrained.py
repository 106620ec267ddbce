"""Answers held to a grammar while they are sampled, by llguidance (MIT).

Chosen over xgrammar (Apache-2.0) by measurement (``benchmarks/token_masks.py``) and because it
needs nothing else installed. It says no to what it does not enforce, instead of passing over it.
"""

import importlib.util
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from megatron_k2.data.tokenizer import Tokenizer
from megatron_k2.errors import UserError

if TYPE_CHECKING:
    from llguidance import LLMatcher


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
    """Compiles grammars for one vocabulary.

    Args:
        tokenizer: its ids' bytes are what letters of a grammar are matched with.
        vocab_size: rows of the model's head.
        end_id: allowed where an answer may end.

    Raises:
        UserError: llguidance is not installed, or the tokenizer's tokens are not bytes.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_id: int) -> None:
        if importlib.util.find_spec("llguidance") is None:
            raise UserError(
                "schemas and forced tool calls need llguidance, which is not installed here; "
                "pip install 'megatron-k2[grammar]'"
            )
        import llguidance

        self._library, self._vocab_size, self._end_id = llguidance, vocab_size, end_id
        described = _Described(tokenizer, vocab_size, end_id)
        self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(described))

    def compiled(self, grammar: str) -> GrammarConstraint:
        """A constraint at an answer's beginning.

        Args:
            grammar: of ``engine/grammar.py``.

        Raises:
            UserError: it is wrong, cannot be met, or asks for what is not enforced.
        """
        matcher_of = self._library.LLMatcher
        matcher = matcher_of(self._tokenizer, matcher_of.grammar_from_lark(grammar), log_level=0)
        if matcher.is_error():
            said = matcher.get_error().partition("\n")[0].rpartition("JSON schema: ")[2]
            raise UserError(f"a schema cannot be enforced: {said[:300]}")
        found = GrammarConstraint(matcher, self._vocab_size, self._end_id)
        found.fresh().allowed()
        return found


class _Described:
    """A tokenizer as llguidance asks for it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = end_id, None
        self.tokens = tokenizer.token_bytes()[:vocab_size]
        self.special_token_ids = sorted(i for i in tokenizer.special_ids.values() if i < vocab_size)

    def __call__(self, text: Any) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode())
