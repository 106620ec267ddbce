r"""The one answer that a text commits to: nothing is right because it stands somewhere.

A text that lists many values must not pass by one of them. The last ``\boxed{…}`` counts; without
one, what follows the last "answer is" or "answer:"; without that, the one formula of the last line,
or that line where it is nothing but an expression. Marks around it are taken away.
"""

import re

from megatron_k2.gym.mathematics.numbers import quantity

LONGEST = 2000
"""Characters of an answer that are looked at; no reference is that long."""
SAYS = re.compile(
    r"(?:final\s+)?answer\s*(?:is|=|:|\*\*:|:\*\*)\s*:?\s*(.+?)\s*$", re.IGNORECASE | re.MULTILINE
)
MARKED = re.compile(r"#{3,}\s*(\S.*)|[^$]*\$([^$]+)\$[^$\d]*")
"""A last line after GSM8K's mark, or with one formula in it."""
LOOKS_BARE = re.compile(r"[-+0-9.,/\\$({\[%^*=a-zA-Z)}\]\s°√π]{1,80}")
FOUR_LETTERS = re.compile(r"(?<!\\)\b[A-Za-z]{4,}")


def last_boxed(text: str) -> str | None:
    r"""What the last ``\boxed`` or ``\fbox`` holds; ``None`` where its braces do not close."""
    start = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    if start < 0:
        return None
    opening = text.find("{", start)
    if opening < 0 or text[start:opening].strip() not in (r"\boxed", r"\fbox"):
        words = text[start:].split(maxsplit=1)  # \boxed 7
        return words[1].split()[0] if len(words) > 1 and words[0] in (r"\boxed", r"\fbox") else None
    depth = 0
    for place in range(opening, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[opening + 1 : place]
    return None


def final_answer(text: str) -> str | None:
    """The expression that a text ends in; ``None`` where it commits to none."""
    boxed = last_boxed(text)
    if boxed is None and r"\boxed" in text:
        return None  # a box that does not close: the answer was cut off
    if boxed is None:
        said = SAYS.findall(text)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if said:
            boxed = said[-1]
        elif lines and (marked := MARKED.fullmatch(lines[-1])):
            boxed = marked.group(1) or marked.group(2)
        elif lines and _is_expression(lines[-1]):
            boxed = lines[-1]
    if boxed is None:
        return None
    found = stripped(boxed)
    return found[:LONGEST] or None


def _is_expression(line: str) -> bool:
    if quantity(stripped(line)):
        return True
    return bool(LOOKS_BARE.fullmatch(line)) and not FOUR_LETTERS.search(line)


def stripped(text: str) -> str:
    """Without marks around it, and the full stop that ends a sentence."""
    text = text.strip()
    for _ in range(4):
        text = text.removeprefix("**").removesuffix("**").strip()
        for start, end in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
            if text.startswith(start) and text.endswith(end) and len(text) > len(start + end):
                text = text[len(start) : -len(end)].strip()
        if text.endswith((".", ",", ";")) and not text.endswith("..."):
            text = text[:-1].strip()
    return text
