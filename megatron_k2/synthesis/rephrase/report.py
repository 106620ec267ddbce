"""What a run made: how much was kept by stage and signal, lengths, diversity, examples."""

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.synthesis.rephrase.diversity import distinct, self_bleu, spread
from megatron_k2.synthesis.rephrase.mixture import source_of
from megatron_k2.synthesis.work.merge import KEPT_FILE, REJECTED_FILE

SAMPLE = 300
"""Kept texts, the first by content hash and so at random, of which diversity is measured."""


@dataclass
class Summary:
    """A run in numbers."""

    num_kept: int = 0
    num_rejected: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    """Of what was kept."""
    stages: Counter[str] = field(default_factory=Counter)
    """Where what was rejected was."""
    signals: dict[str, list[int]] = field(default_factory=dict)
    """By surface signal: documents kept and rejected at the gate that showed it."""
    prompts: dict[str, list[int]] = field(default_factory=dict)
    """By prompt: documents kept, and all."""
    length_ratios: list[float] = field(default_factory=list)
    """Tokens of a rewrite over its source's, of what was kept."""
    diversity: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    """By measure: of the rewrites, and of their sources."""

    @property
    def keep_rate(self) -> float:
        """Kept over all."""
        return self.num_kept / max(self.num_kept + self.num_rejected, 1)

    @property
    def length(self) -> tuple[float, float, float] | None:
        """The tenth, the middle and the ninetieth percent of the ratios."""
        if len(self.length_ratios) < 2:
            return None
        cuts = statistics.quantiles(self.length_ratios, n=10)
        return cuts[0], statistics.median(self.length_ratios), cuts[-1]


def records(run: Path, name: str) -> Iterator[dict[str, Any]]:
    """Of ``kept.jsonl`` or ``rejected.jsonl``.

    Raises:
        UserError: the run is not merged yet.
    """
    path = run / name
    if not path.is_file():
        raise UserError(f"{run} has no {name}; run megatron-k2 rephrase run to its end")
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def summarized(run: Path) -> Summary:
    """A run's numbers.

    Raises:
        UserError: it is not merged yet.
    """
    found = Summary()
    sample: list[dict[str, Any]] = []
    for record in records(run, KEPT_FILE):
        found.num_kept += 1
        found.verdicts[record["verdict"]] += 1
        found.length_ratios.append(record["num_tokens"] / max(record["source_tokens"], 1))
        _count(found, record, is_kept=True)
        if len(sample) < SAMPLE:
            sample.append(record)
    for record in records(run, REJECTED_FILE):
        found.num_rejected += 1
        found.stages[record["stage"]] += 1
        _count(found, record, is_kept=False)
    source = source_of(run)
    texts = [record["text"] for record in sample]
    sources = [source(record["id"]) for record in sample]
    measures = {
        "distinct-1": lambda some: distinct(some, 1),
        "distinct-3": lambda some: distinct(some, 3),
        "self-BLEU": self_bleu,
        "spread of words": spread,
    }
    for name, measure in measures.items():
        found.diversity[name] = (measure(texts), measure(sources))
    return found


def _count(summary: Summary, record: Mapping[str, Any], *, is_kept: bool) -> None:
    for name in record.get("signals", {}):
        summary.signals.setdefault(name, [0, 0])[0 if is_kept else 1] += 1
    counts = summary.prompts.setdefault(record["prompt"], [0, 0])
    counts[0] += is_kept
    counts[1] += 1


def examples(run: Path, number: int) -> list[dict[str, Any]]:
    """Sources beside rewrites for a page: half of them rejected where there are so many."""
    source = source_of(run)
    found: list[dict[str, Any]] = []
    for name, most in ((REJECTED_FILE, number // 2), (KEPT_FILE, number)):
        for record in records(run, name):
            if len(found) >= most:
                break
            found.append(
                {
                    "group": record["verdict"] if name == KEPT_FILE else record["stage"],
                    "is_good": name == KEPT_FILE,
                    "left": source(record["id"]),
                    "right": record["text"],
                    "said": record["reason"],
                    "facts": {
                        "source": record["source_id"],
                        "prompt": record["prompt"],
                        "model": record["model"],
                        **record.get("scores", {}),
                    },
                }
            )
    return found
