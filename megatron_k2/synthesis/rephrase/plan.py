"""What a run will ask and take, counted before a request is made."""

import hashlib
from dataclasses import dataclass, replace

from megatron_k2.fidelity.statements import SYSTEM as CHECK_SYSTEM
from megatron_k2.fidelity.statements import Statement, question, statements
from megatron_k2.synthesis.rephrase.pieces import Counter, Piece, counter_of, excerpts
from megatron_k2.synthesis.rephrase.prompts import Prompt, chosen
from megatron_k2.synthesis.rephrase.settings import Settings

GROWTH = 1.15
"""Tokens of a rewrite over its piece's, JSON around it included; an estimate of ours."""
_VOTES = 1.2
"""Votes on a statement: most are settled by the first; ours."""
_BEFORE_PIECES = 4
"""Pieces before it that a statement of a rewrite is held against, at the most."""


@dataclass(frozen=True)
class Plan:
    """Counts; tokens of answers, and all of the check, are estimates."""

    num_documents: int = 0
    source_tokens: int = 0
    num_excerpts: int = 0
    num_pieces: int = 0
    num_copied: int = 0
    """Pieces of code, which are not asked for."""
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    check_requests: int = 0
    check_prompt_tokens: int = 0
    check_completion_tokens: int = 0

    def plus(self, other: "Plan") -> "Plan":
        """Both."""
        return Plan(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))


def _values(plan: Plan) -> tuple[int, ...]:
    return tuple(int(value) for value in vars(plan).values())


def planned(settings: Settings) -> Plan:
    """The whole run's.

    Raises:
        UserError: an input cannot be read.
    """
    count, prompts = counter_of(settings.tokenizer), settings.prompts()
    found = Plan()
    for document in settings.documents():
        cut = excerpts(document.text, count, settings.cut)
        own = Plan(num_documents=1, source_tokens=sum(p.num_tokens for part in cut for p in part))
        content = hashlib.sha256(document.text.encode()).hexdigest()
        for number in range(settings.rephrasings):
            prompt = chosen(prompts, settings.seed, content, number)
            for pieces in cut:
                own = own.plus(_of_excerpt(pieces, prompt, count, settings))
        found = found.plus(own)
    return found


def _of_excerpt(pieces: list[Piece], prompt: Prompt, count: Counter, settings: Settings) -> Plan:
    asked = [piece for piece in pieces if not piece.is_copied]
    context = sum(piece.num_tokens for piece in pieces)
    fixed = count(prompt.system) + count(prompt.messages("", "", "")[1]["content"])
    prompt_tokens = completion = written = 0
    for piece in pieces:
        if not piece.is_copied:
            prompt_tokens += fixed + context + written + piece.num_tokens
            completion += round(GROWTH * piece.num_tokens)
        written += round(GROWTH * piece.num_tokens)
    found = Plan(
        num_excerpts=1,
        num_pieces=len(pieces),
        num_copied=len(pieces) - len(asked),
        requests=len(asked),
        prompt_tokens=prompt_tokens,
        completion_tokens=completion,
    )
    return found if settings.check_model is None else _with_check(found, pieces, count)


def _with_check(plan: Plan, pieces: list[Piece], count: Counter) -> Plan:
    """Each statement is asked of both texts; that of the rewrite with what stands before it."""
    requests = tokens = 0.0
    for number, piece in enumerate(pieces):
        if piece.is_copied:
            continue
        before = sum(p.num_tokens for p in pieces[max(number - _BEFORE_PIECES, 0) : number])
        own = statements(piece.text)
        fixed = count(CHECK_SYSTEM) + count(question("", Statement(""), 0)[0])
        said = sum(count(each.text) + count(each.before) for each in own)
        requests += 2 * len(own) * _VOTES
        tokens += _VOTES * (
            2 * said + len(own) * (2 * fixed + before + (1 + GROWTH) * piece.num_tokens)
        )
    return replace(
        plan,
        check_requests=round(requests) + 1,  # whether the source is abuse
        check_prompt_tokens=round(tokens) + sum(piece.num_tokens for piece in pieces),
        check_completion_tokens=round(requests) + 1,
    )
