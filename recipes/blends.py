"""What each phase of K2's pretraining reads.

The report names four domains (section 2.2) and gives neither their weights nor what changes with
the phase (2.5: annealing, long-context activation). Every weight here is therefore an assumption,
to be replaced by one's own; after Kimi k1.5's report (arXiv:2501.12599, pretraining stages), on
which K2's data pipeline builds:

- its cooldown takes high-fidelity subsets, and mathematics, knowledge and code above web text;
- its long-context stage takes 40% of sequences that are long by themselves, and 60% as before.
"""

from megatron_k2.launch.blend import DataBlend

DOMAINS = ("web", "code", "mathematics", "knowledge")
"""The four domains of report 2.2."""
PRETRAIN = (0.25, 0.25, 0.25, 0.25)
ANNEAL = (0.10, 0.30, 0.30, 0.30)
LONG_PART = 0.4
"""Part of the long-context phases' tokens that is long documents; Kimi k1.5's figure."""

_SHORT = (round((1 - LONG_PART) * weight, 4) for weight in ANNEAL)
_LONG = ((*_SHORT, LONG_PART), (*DOMAINS, "long"))
BLENDS = {
    "pretrain": (PRETRAIN, DOMAINS),
    "anneal_4k": (ANNEAL, DOMAINS),
    "long_32k": _LONG,
    "yarn_128k": _LONG,
    "continue": (ANNEAL, DOMAINS),
}
"""Phase -> (parts of the tokens, prefixes of the datasets)."""

_WHY = {
    "pretrain": "assumption: equal; report 2.2 names four domains and no weights",
    "anneal_4k": "assumption: less web text, as k1.5's cooldown; not stated for K2",
    "long_32k": "assumption: 40% long documents, k1.5's part; not stated for K2",
    "yarn_128k": "assumption: as at 32k; not stated for K2",
    "continue": "assumption: as the annealing; not stated for K2",
}
SOURCES = {
    phase: (
        ("data", "yours"),
        ("data.weights", why),
        ("data.prefixes", "report 2.2: web text, code, mathematics, knowledge"),
    )
    for phase, why in _WHY.items()
}
"""Phase -> sources of a recipe's ``data``."""


def blend_of(phase: str, root: str, *, is_synthetic: bool = False) -> DataBlend:
    """The blend of a phase of ``kimi_k2.RUNS`` below ``root``."""
    weights, prefixes = BLENDS[phase]
    return DataBlend(root, weights, prefixes, is_synthetic=is_synthetic)
