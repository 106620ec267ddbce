"""Which language a text is in: by its script, then by its commonest words. No model."""

import re
from collections import Counter

from megatron_k2.fidelity.sentences import folded, words

_SCRIPTS = (
    ("ja", re.compile(r"[\u3040-\u30ff]")),
    ("ko", re.compile(r"[\uac00-\ud7af]")),
    ("zh", re.compile(r"[\u4e00-\u9fff]")),
    ("ru", re.compile(r"[\u0400-\u04ff]")),
    ("el", re.compile(r"[\u0370-\u03ff]{3,}")),
    ("ar", re.compile(r"[\u0600-\u06ff]")),
    ("he", re.compile(r"[\u0590-\u05ff]")),
    ("hi", re.compile(r"[\u0900-\u097f]")),
)
"""Of several languages of one script the commonest is named."""
_COMMON = {
    "en": "the of and to in is that for it as with be this are by from we which if then",
    "de": "der die das und ist nicht ein eine den von mit fur auf sei dass wir dann sich zu im",
    "fr": "le la les des est une dans que pour qui par sur soit nous alors du au donc et un",
    "es": "el los las una que por con para del es se como sea entonces tenemos al su y un en",
    "it": "il lo gli che di una per con sono del della sia allora abbiamo quindi non e in un si",
    "pt": "os as uma que por com para do da nao em se um seja entao temos dos das e ao",
    "nl": "de het een van en is dat niet met voor op zijn dan we als er in te aan bij",
    "pl": "i w na z ze jest nie do sie oraz dla niech wtedy jezeli to o jak po przez od",
    "sv": "och att det som en ar for pa med av den ett inte vi om till har da sa i",
    "tr": "ve bir bu icin ile olan ise da de olarak en cok gibi kadar daha ne her o sonra",
}
_WORDS = {name: frozenset(text.split()) for name, text in _COMMON.items()}
_LEAST_SHARE = 0.05
"""Of the words that must be common ones; ours."""
COMMA_IS_POINT = frozenset("de fr es it pt nl pl sv tr ru el".split())
"""Languages that write 3,14."""


def language_of(text: str) -> str | None:
    """ISO 639-1; ``None`` where it cannot be told, as of formulae alone."""
    letters = [each for each in text if each.isalpha()]
    for name, form in _SCRIPTS:
        if sum(map(len, form.findall(text))) > 0.2 * max(len(letters), 1):
            return name
    said = Counter(folded(word) for word in words(text))
    total = sum(said.values())
    shares = {name: sum(said[word] for word in known) for name, known in _WORDS.items()}
    best = max(shares, key=lambda name: shares[name])
    return best if total and shares[best] >= _LEAST_SHARE * total else None
