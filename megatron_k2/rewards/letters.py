"""The probability of each letter that an answer may be, from an endpoint's log-probabilities."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

_AROUND = "*\"'().:"


def letter_shares(logprobs: Any, letters: Sequence[str]) -> dict[str, float] | None:
    """Shares at the first token that is one of the letters, adding up to 1.

    Args:
        logprobs: of a choice, as OpenAI's chat completions give them; anything else is no answer.
        letters: upper case.

    Returns:
        ``None`` where no token is one of them. A letter below all that were returned has 0.
    """
    try:
        places: Sequence[Mapping[str, Any]] = (logprobs or {}).get("content") or ()
        for place in places:
            seen = dict.fromkeys(letters, -math.inf)
            for one in (place, *(place.get("top_logprobs") or ())):
                if (letter := _plain(one)) in seen:
                    seen[letter] = max(seen[letter], float(one["logprob"]))
            most = max(seen.values())
            if _plain(place) in seen and most > -math.inf:
                weights = {letter: math.exp(value - most) for letter, value in seen.items()}
                total = sum(weights.values())
                return {letter: weight / total for letter, weight in weights.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    return None


def letter_said(text: str, letters: Sequence[str]) -> str | None:
    """The last letter that stands alone in a text's end; ``None`` where there is none."""
    found = re.findall(rf"\b([{''.join(letters)}])\b", text.strip().upper()[-200:])
    return found[-1] if found else None


def _plain(one: Mapping[str, Any]) -> str:
    return str(one["token"]).strip().strip(_AROUND).upper()
