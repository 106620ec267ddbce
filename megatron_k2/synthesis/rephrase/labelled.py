"""Pairs of known truth, scored: by the model that checks, or by advice alone."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_k2.errors import UserError
from megatron_k2.fidelity.advisory import score
from megatron_k2.fidelity.calibration import Scored
from megatron_k2.fidelity.check import Settings, Verdict, check
from megatron_k2.fidelity.statements import Asker
from megatron_k2.files import sha256_of_json

FIELDS = ("source", "rewrite", "kind")


@dataclass(frozen=True)
class Labelled:
    """One pair."""

    source: str
    rewrite: str
    kind: str
    """``faithful``, or a name for what is wrong."""

    @property
    def key(self) -> str:
        """Of its source: rewrites of one text are in one half."""
        return sha256_of_json(self.source)


@dataclass(frozen=True)
class Found:
    """What was found of one pair."""

    kind: str
    score: float
    verdict: Verdict
    reason: str


def read_pairs(path: Path) -> list[Labelled]:
    """Of a file, a JSON object a line.

    Raises:
        UserError: no such file, or a line that is none; names it.
    """
    if not path.is_file():
        raise UserError(f"--pairs {path}: no such file; expected lines with {', '.join(FIELDS)}")
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            values = [row[name] for name in FIELDS]
            if not all(isinstance(value, str) for value in values):
                raise TypeError("a field is no text")
            json.dumps(values, ensure_ascii=False).encode()
            found.append(Labelled(*values))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{path}:{number}: expected an object with {', '.join(FIELDS)} as texts "
                f"({type(error).__name__}: {str(error)[:120]})"
            ) from None
    if not found:
        raise UserError(f"--pairs {path}: no pair in it")
    return found


async def scored(
    pairs: Sequence[Labelled], asker: Asker | None, settings: Settings, concurrency: int
) -> list[Found]:
    """Each pair's score, in their order.

    With a model it is the least support of any statement; a pair that the gates refuse has 0, and
    one on which no vote could be read has none of its own and gets a half.

    Raises:
        Exception: what the asker raises.
    """
    free = asyncio.Semaphore(concurrency)

    async def one(pair: Labelled) -> Found:
        async with free:
            found = await check(pair.source, pair.rewrite, asker, settings)
        if asker is None:
            value = score(pair.source, pair.rewrite)
        elif found.verdict is Verdict.UNVERIFIED or found.score is None:
            value = 0.5
        else:
            value = found.score
        return Found(pair.kind, value, found.verdict, found.reason)

    return list(await asyncio.gather(*map(one, pairs)))


def of_kinds(pairs: Sequence[Labelled], found: Sequence[Found]) -> list[Scored]:
    """For ``fidelity/calibration.py``."""
    return [
        Scored(each.kind, each.score, pair.key) for pair, each in zip(pairs, found, strict=True)
    ]
