"""The hack-check: sentences by which an answer claims to comply, taken out before it is judged.

"This response contains the word ocean three times: ocean, ocean, ocean" must not pay. What an
answer says of itself is evidence of nothing, and must not be what satisfies a constraint either.
"""

import re

SPLIT = re.compile(r"(?<=[.!?])[ \t]+|\n")
SELF = (
    r"\b(?:(?:this|my|the above)\s+(?:\w+\s+)?"
    r"(?:text|essay|paragraph|passage|story|poem|list|message)"
    r"|(?:this|my|the|above)\s+(?:\w+\s+)?(?:response|answer|reply|output))s?\b"
)
CLAIMED = (
    r"(?:follow|satisf|compl(?:y|ies)|meet|adher|includ|contain|fulfil|respect|obey|honou?r|use[sd]?"
    r"|conform|match|exceed|avoid|mention|ensur|made sure|has exactly|is written|is correct|passes)"
)
CLAIMS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"{SELF}.*\b{CLAIMED}\w*\b",
        rf"\bI(?:'ve| have| am|'m| did)?\b.*\b{CLAIMED}\w*.*\b(?:constraint|instruction|requirement"
        r"|request|rule|word|sentence|bullet|paragraph|keyword|comma|format|letter)s?\b",
        r"\bas (?:you )?(?:requested|instructed|required|asked|specified|per)\b",
        r"\b(?:per|according to) (?:the|your) (?:instruction|request|requirement|constraint)s?\b",
        r"\b(?:constraint|instruction|requirement|rule)s?\b.*\b(?:met|satisfied|followed|fulfilled|checked"
        r"|complied|done|passed)\b",
        r"\b(?:all|every|each) (?:of the )?(?:constraint|instruction|requirement|rule)s?\b",
        r"^\W*(?:word|sentence|paragraph|bullet|letter|character)s?\s*(?:count)?\s*[:=]\s*\d+",
        r"\((?:exactly|approximately|about)?\s*\d+ (?:word|sentence|bullet|paragraph)s?\)",
        r"^\W*(?:note|disclaimer|compliance|checklist|verification|self-check)\b\W*:",
        r"[\u2713\u2714\u2705\u2611]|\[[xX]\]",
        r"\b(?:grader|judge|evaluator|rubric|verifier)s?\b",
    )
)


def is_claim(sentence: str) -> bool:
    """Whether a sentence speaks of the answer itself, or to whoever judges it."""
    return any(claim.search(sentence) for claim in CLAIMS)


def claims_in(answer: str) -> list[str]:
    """Such sentences of an answer."""
    return [part for part in SPLIT.split(answer) if part.strip() and is_claim(part)]


def without_claims(answer: str) -> str:
    """The answer as it stands without them, its other lines and spaces kept."""
    for claim in claims_in(answer):
        answer = answer.replace(claim, "", 1)
    return answer.strip()
