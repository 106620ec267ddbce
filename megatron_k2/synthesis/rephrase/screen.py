"""What keeps a document, or a rewrite, out whatever it says: personal data, control tokens, abuse.

Personal data is found by form, so a name with an address in prose is not seen; abuse is asked of
the model that checks. Which terms apply is the user's to know: this keeps the plain cases out.
"""

import re

from megatron_k2.chat.quoting import control_names
from megatron_k2.fidelity.statements import Asker
from megatron_k2.gym.points import holds

PERSONAL = (
    ("an e-mail address", re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{2,63})+")),
    ("a telephone number", re.compile(r"(?<![\w.])\+\d{1,3}[ .-]?(?:\(?\d{1,4}\)?[ .-]?){2,5}\d")),
    ("a telephone number", re.compile(r"(?<![\w-])\(?\d{3}\)?[ .-]\d{3}[.-]\d{4}(?![\w-])")),
    ("a social security number", re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])")),
    ("a bank account number", re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?\w{1,3})?\b")),
)
_CARD = re.compile(r"(?<![\w.])(?:\d[ -]?){12,18}\d(?![\w.])")
ABUSE = (
    "It abuses or threatens people, or calls for hatred or violence against a group, in its own "
    "voice: not by reporting or discussing that somebody did."
)
_TASK = "Here is a text for an encyclopaedia of everything that people write."
_VOTES = 3


def personal_data(text: str) -> str | None:
    """What kind of personal data a text has; ``None`` where none is seen."""
    for kind, form in PERSONAL:
        if form.search(text):
            return kind
    for match in _CARD.finditer(text):
        if _is_card([int(each) for each in match[0] if each.isdigit()]):
            return "a payment card number"
    return None


def _is_card(digits: list[int]) -> bool:
    """The Luhn sum, which one number in ten passes by chance."""
    doubled = [2 * d - 9 if d > 4 else 2 * d for d in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0 and len(set(digits)) > 1


def new_control_names(source: str, rewrite: str) -> list[str]:
    """Names of control tokens that a rewrite has and its source has not."""
    known = set(control_names(source))
    return [name for name in control_names(rewrite) if name not in known]


async def is_abusive(asker: Asker, text: str) -> bool | None:
    """By the model's votes; ``None`` where none could be read.

    Raises:
        Exception: what the asker raises.
    """
    return await holds(asker, _TASK, text, ABUSE, _VOTES)
