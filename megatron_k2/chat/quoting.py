"""Text from elsewhere inside a prompt: a JSON string in which no control token has its name.

A server renders its template to text and tokenizes that, so ``<|im_end|>`` in a document would end
the turn. JSON may write any letter as an escape, so what begins such a name is written as one.
"""

import json
import re

CONTROL_NAME = re.compile(
    r"<(?:[|｜][^<>\n]{1,64}?[|｜]|/?[a-z_]{1,40})>"
    r"|<[|｜]|[|｜]>"
    r"|\[/?(?:INST|EOS|BOS|PAD|SEP|CLS|MASK|UNK|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS)\]"
    r"|<<SYS>>|<</SYS>>"
)
"""Names of control tokens as vocabularies write them, and plain tags, which some take for such."""
_FIRST = {"<": "\\u003c", "[": "\\u005b", "|": "\\u007c", "｜": "\\uff5c"}


def quoted(text: str) -> str:
    """``text`` as a JSON string; ``json.loads`` gives it back."""
    return CONTROL_NAME.sub(_escaped, json.dumps(text, ensure_ascii=False))


def _escaped(name: re.Match[str]) -> str:
    return "".join(_FIRST.get(letter, letter) for letter in name[0])


def control_names(text: str) -> list[str]:
    """What looks like a control token, each once; plain tags as of HTML are not meant."""
    found = (match[0] for match in CONTROL_NAME.finditer(text))
    return list(dict.fromkeys(name for name in found if not re.fullmatch(r"</?[a-z_]+>", name)))
