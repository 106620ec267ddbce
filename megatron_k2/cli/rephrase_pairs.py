"""``megatron-k2 rephrase score`` and ``calibrate``: labelled pairs, scored."""

import argparse
import asyncio
import json
from collections import Counter, defaultdict
from dataclasses import asdict
from typing import TYPE_CHECKING

from megatron_k2.cli.endpoint import connected
from megatron_k2.errors import UserError

if TYPE_CHECKING:
    from megatron_k2.synthesis.rephrase.labelled import Found, Labelled


def score(arguments: argparse.Namespace) -> int:
    """Print scores by kind, verdicts and AUC."""
    from megatron_k2.fidelity.calibration import FAITHFUL, auc
    from megatron_k2.files import write_atomically
    from megatron_k2.synthesis.rephrase.labelled import of_kinds
    from megatron_k2.terminal import show, table

    pairs, found = asyncio.run(_scored(arguments))
    by_kind: dict[str, list[Found]] = defaultdict(list)
    for each in found:
        by_kind[each.kind].append(each)
    rows = table("kind", "pairs", "mean score", "least", "largest", "AUC", "verdicts")
    values = of_kinds(pairs, found)
    good = [each for each in values if each.kind == FAITHFUL]
    for kind in sorted(by_kind, key=lambda kind: (kind != FAITHFUL, kind)):
        scores = [each.score for each in by_kind[kind]]
        own = [each for each in values if each.kind == kind]
        area = "" if kind == FAITHFUL or not good else f"{auc([*good, *own]):.3f}"
        said = Counter(str(each.verdict) for each in by_kind[kind])
        rows.add_row(
            kind,
            f"{len(scores)}",
            f"{sum(scores) / len(scores):.3f}",
            f"{min(scores):.3f}",
            f"{max(scores):.3f}",
            area,
            ", ".join(f"{number} {verdict}" for verdict, number in sorted(said.items())),
        )
    if arguments.output is not None:
        lines = (json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in found)
        write_atomically(arguments.output, "".join(lines).encode())
    what = "the least support of a statement" if arguments.endpoint else "advisory: not a verdict"
    show(rows)
    print(f"AUC {auc(values):.3f} over {len(found)} pairs ({what})")
    return 0


def calibrate(arguments: argparse.Namespace) -> int:
    """Choose a threshold on half of the pairs, and print what it does to the other half."""
    from megatron_k2.fidelity import calibration
    from megatron_k2.files import write_atomically
    from megatron_k2.synthesis.rephrase.labelled import of_kinds

    if not 0 < arguments.keep <= 1:
        raise UserError(f"--keep {arguments.keep:g}: expected more than 0, up to 1")
    pairs, found = asyncio.run(_scored(arguments))
    chosen = calibration.calibrate(of_kinds(pairs, found), arguments.keep)
    print(
        f"threshold {chosen.threshold:.4f} of {chosen.num_pairs} pairs, AUC {chosen.auc:.3f}; on "
        f"the half that did not choose it: {chosen.kept:.0%} of the faithful kept"
    )
    for kind, share in chosen.dropped.items():
        print(f"  {kind}: {share:.0%} dropped")
    if arguments.output is not None:
        what = "model" if arguments.endpoint else "advisory"
        record = {**asdict(chosen), "score": what, "model": arguments.model}
        write_atomically(arguments.output, (json.dumps(record, indent=1) + "\n").encode())
    return 0


async def _scored(
    arguments: argparse.Namespace,
) -> "tuple[list[Labelled], list[Found]]":
    from megatron_k2.engine.protocol import EngineError
    from megatron_k2.fidelity.check import Settings
    from megatron_k2.rewards.asker import EndpointAsker
    from megatron_k2.synthesis.rephrase.labelled import read_pairs, scored

    if arguments.concurrency < 1:
        raise UserError(f"--concurrency {arguments.concurrency}: expected 1 or more")
    pairs = read_pairs(arguments.pairs)
    settings = Settings(arguments.votes, arguments.extracts)
    if arguments.endpoint is None:
        return pairs, await scored(pairs, None, settings, arguments.concurrency)
    client, arguments.model = await connected(arguments, arguments.concurrency)
    try:
        asker = EndpointAsker(client, arguments.model)
        return pairs, await scored(pairs, asker, settings, arguments.concurrency)
    except EngineError as error:
        raise UserError(f"--endpoint {arguments.endpoint}: {error}") from None
    finally:
        await client.close()
