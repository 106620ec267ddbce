"""``passages.jsonl``: fictional facts by topic, each sentence twice and in wrong versions.

``said``: [as the source has it, in other words]. ``wrong``: kind -> [place, a wrong rewording of
that sentence]; *addition* is a sentence that the source does not have.
"""

import json
from pathlib import Path
from typing import NamedTuple


class Passage(NamedTuple):
    """One source."""

    topic: str
    said: list[list[str]]
    wrong: dict[str, tuple[int, str]]


LINES = Path(__file__).with_name("passages.jsonl").read_text("utf-8").splitlines()
PASSAGES = [Passage(**json.loads(line)) for line in LINES]
