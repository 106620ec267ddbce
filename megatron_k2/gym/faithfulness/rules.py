"""What can be said without a model of whether a context supports a sentence.

*Supported*: one sentence of the context has all its content words and numbers, in their order, with
the same negations, no opposite, and no *if* or *except* more. *Not*: it has a number or a name that
the context has not, or hardly a word of its own there. Everything between is for a model: a
paraphrase and a subtle falsehood look alike from outside.
"""

from megatron_k2.fidelity.quantities import values
from megatron_k2.fidelity.sentences import content, folded, sentences, words
from megatron_k2.fidelity.statements import Statement
from megatron_k2.fidelity.surface import Surface, aligned, num_negations, opposites

_QUALIFIERS = frozenset(
    "if unless except only until without but almost nearly hardly perhaps maybe may might could "
    "should would allegedly supposedly reportedly claimed claims said says believed before after "
    "some few many most half rarely sometimes often".split()
)
"""Words that a sentence must not lose: what is left would say more."""

_FOREIGN = 0.34
"""Share of a sentence's content in the context under which it is not the context's; ours."""


def judged(statement: Statement, context: str) -> tuple[bool | None, str]:
    """Whether a context supports a statement, and why; ``None``: the rules cannot say."""
    surface = Surface(context, statement.text)
    if gates := surface.gates():
        return False, gates[0].evidence
    if new := [each for each in surface.advice() if each.name == "new name"]:
        return False, new[0].evidence
    overlap = aligned(statement.text, context)[0].overlap
    if overlap < _FOREIGN:
        return False, f"{overlap:.0%} of its content is in the context"
    if any(_is_part_of(statement.text, each) for each in sentences(context)):
        return True, "a sentence of the context has all of it"
    return None, "the rules cannot tell a paraphrase from a change; give a model to ask"


def _is_part_of(text: str, other: str) -> bool:
    """Whether ``other`` without some of its words is ``text``, and none of those qualifies it."""
    if num_negations(text) != num_negations(other) or opposites(text, other):
        return False
    if not values(text) <= values(other):
        return False
    place, there = 0, content(other)
    for word in content(text):
        if word not in there[place:]:
            return False
        place = there.index(word, place) + 1
    own = {folded(word) for word in words(text)}
    lost = {folded(word) for word in words(other)} - own
    return not lost & _QUALIFIERS
