"""``megatron-k2 critic``: how far a judge is to be trusted, and what happens where it is not."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_k2.cli.endpoint import add_model, connected
from megatron_k2.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from megatron_k2.rewards.best_of_n import Point
    from megatron_k2.rewards.calibration import Calibration
    from megatron_k2.rewards.judge import Judge
    from megatron_k2.rewards.pairs import Pair


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-k2 critic", description=__doc__.partition(": ")[2]
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    calibrate = verbs.add_parser(
        "calibrate",
        help="judge pairs of known truth",
        description="Judges every pair in both orders, as it stands and with the defences. Exit "
        "code 1 where the critic is below its bar.",
    )
    _add_judge(calibrate)
    calibrate.add_argument(
        "--pairs",
        type=Path,
        metavar="FILE.jsonl",
        help="objects with prompt, a, b, better (a or b) and kind; default: 600 made by rule",
    )
    calibrate.add_argument("--rubrics", type=Path, metavar="FILE.jsonl", help="instead of ours")
    calibrate.add_argument("--output", type=Path, metavar="FILE.json", help="for RL and synthesis")
    calibrate.add_argument("--concurrency", type=int, default=64, help="(default: %(default)s)")
    calibrate.add_argument("--seed", type=int, default=0, help="of the pairs that are made")
    study = verbs.add_parser("best-of-n", help="a critic's score and the truth over n, as a figure")
    _add_judge(study)
    study.add_argument("--prompts", type=int, default=100, help="(default: %(default)s)")
    study.add_argument("--png", type=Path, required=True)
    study.add_argument("--seed", type=int, default=0)
    pairs = verbs.add_parser("pairs", help="write the pairs, or dialogues that train a critic")
    pairs.add_argument("output", type=Path, metavar="FILE.jsonl")
    pairs.add_argument("--chat", action="store_true", help="dialogues for 'data chat'")
    pairs.add_argument("--per-kind", type=int, default=100, help="(default: %(default)s)")
    pairs.add_argument("--seed", type=int, default=1, help="another than the calibration's")
    return parser


def _add_judge(command: argparse.ArgumentParser) -> None:
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--endpoint", metavar="URL", help="of an OpenAI-compatible server")
    which.add_argument("--scripted", metavar="NAME", help="a critic with a known fault; 'all'")
    command.add_argument("--thinks", action="store_true", help="let it reason before it decides")
    add_model(command)


def main(argv: list[str]) -> int:
    """Run a verb; 1 where a critic is below its bar."""
    arguments = _parser().parse_args(argv)
    verbs = {"calibrate": _calibrate, "best-of-n": _study, "pairs": _pairs}
    return verbs[arguments.verb](arguments)


def _pairs(arguments: argparse.Namespace) -> int:
    from megatron_k2.files import write_atomically
    from megatron_k2.rewards.pairs import made_pairs, to_line
    from megatron_k2.rewards.preferences import samples

    made = made_pairs(arguments.seed, arguments.per_kind)
    lines = [one.to_line() for one in samples(made)] if arguments.chat else map(to_line, made)
    text = "".join(lines)
    write_atomically(arguments.output, text.encode())
    print(f"{arguments.output}: {text.count(chr(10)):,} lines of {len(made):,} pairs")
    return 0


def _calibrate(arguments: argparse.Namespace) -> int:
    import asyncio

    from megatron_k2.rewards.calibration import write_calibration
    from megatron_k2.rewards.pairs import made_pairs, read_pairs

    if arguments.concurrency < 1:
        raise UserError(f"--concurrency {arguments.concurrency}: expected 1 or more")
    given = arguments.pairs
    pairs = made_pairs(arguments.seed) if given is None else read_pairs(given)
    found = asyncio.run(_calibrated(arguments, pairs))
    for one in found:
        _print(one)
    if arguments.output is not None:
        if len(found) != 1:
            raise UserError("--output holds one critic; name it with --scripted")
        write_calibration(found[0], arguments.output)
        print(f"written to {arguments.output}")
    is_asked_for_all = arguments.scripted == "all"
    return 0 if is_asked_for_all else int(bool(found[0].shortfalls))


async def _calibrated(arguments: argparse.Namespace, pairs: "list[Pair]") -> "list[Calibration]":
    from megatron_k2.rewards.measuring import calibrate
    from megatron_k2.rewards.rubrics import DEFAULT, read_rubrics

    rubrics = DEFAULT if arguments.rubrics is None else read_rubrics(arguments.rubrics)
    judges, close = await _judges(arguments, pairs)
    try:
        return [
            await calibrate(
                judge,
                pairs,
                rubrics,
                concurrency=arguments.concurrency,
                tell=_progress(judge.name),
            )
            for judge in judges
        ]
    finally:
        await close()


def _progress(name: str) -> "Callable[[int, int], None]":
    import time

    began = time.monotonic()

    def tell(done: int, total: int) -> None:
        if sys.stderr.isatty():
            rate = done / max(1e-9, time.monotonic() - began)
            left = (total - done) / rate
            end = "\n" if done == total else "\r"
            print(
                f"{name}: {done} of {total} pairs, {rate:.1f}/s, {left:.0f} s left",
                end=end,
                file=sys.stderr,
            )

    return tell


async def _judges(
    arguments: argparse.Namespace, pairs: "list[Pair]"
) -> "tuple[Sequence[Judge], Callable[[], Awaitable[None]]]":
    """The critics that are asked for, and what closes them."""
    from megatron_k2.rewards.scripted import scripted_judges

    async def nothing() -> None:
        return None

    if arguments.scripted is not None:
        known = scripted_judges(pairs)
        names = list(known) if arguments.scripted == "all" else [arguments.scripted]
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"--scripted {unknown[0]}: expected all, {', '.join(known)}")
        return [known[name] for name in names], nothing
    from megatron_k2.rewards.judge import EndpointJudge

    client, model = await connected(arguments, getattr(arguments, "concurrency", 64))
    judge: Judge = EndpointJudge(client, model, thinks=arguments.thinks)
    return [judge], client.close


def _print(found: "Calibration") -> None:
    from megatron_k2.terminal import show, table

    listed = table(f"critic {found.judge}, held-out pairs", "bare", "defended")
    bare, defended = found.bare, found.defended
    rows = [
        (f"right: {kind}", str(bare.accuracy[kind]), str(defended.accuracy[kind]))
        for kind in bare.accuracy
    ]
    rows += [
        ("right: all", str(bare.overall), str(defended.overall)),
        ("right: decided by the critic", str(bare.by_critic), str(defended.by_critic)),
        ("winner changes with the order", str(bare.order_flips), str(defended.order_flips)),
        ("attack wins", str(bare.override_wins), str(defended.override_wins)),
        ("unreadable", str(bare.unreadable), str(defended.unreadable)),
        ("log-odds for length", str(bare.length), str(defended.length)),
    ]
    for row in rows:
        listed.add_row(*row)
    show(listed)
    for sentence in found.faults:
        print(f"by itself it {sentence}")
    verdict = "below its bar: " + "; ".join(found.shortfalls) if found.shortfalls else "trusted"
    print(f"{found.judge}: {verdict}\n")


def _study(arguments: argparse.Namespace) -> int:
    import asyncio

    from megatron_k2.files import write_atomically
    from megatron_k2.rewards.best_of_n import SIZES, draw

    if arguments.prompts < 1:
        raise UserError(f"--prompts {arguments.prompts}: expected 1 or more")
    studies = asyncio.run(_studied(arguments))
    write_atomically(arguments.png, draw(studies))
    for title, points in studies.items():
        gold = ", ".join(f"{point.gold:.0%}" for point in points)
        print(f"{title}: right answers at n = {', '.join(map(str, SIZES))}: {gold}")
    print(f"drawn to {arguments.png}")
    return 0


async def _studied(arguments: argparse.Namespace) -> "dict[str, list[Point]]":
    from megatron_k2.rewards.best_of_n import drawn_groups, study
    from megatron_k2.rewards.pairs import Pair
    from megatron_k2.rewards.rubric import RubricReward

    groups = drawn_groups(arguments.prompts, arguments.seed)
    known = [
        Pair(prompt, right.text, wrong.text, "a", "drawn")
        for prompt, answers in groups
        for right in answers
        for wrong in answers
        if right.is_right and not wrong.is_right
    ]
    judges, close = await _judges(arguments, known)
    found = {}
    try:
        for judge in judges:
            for is_defended in (False, True):
                title = f"{judge.name}, {'defended' if is_defended else 'bare'}"
                reward = RubricReward(judge)
                found[title] = await study(reward, groups, is_defended=is_defended)
    finally:
        await close()
    return found
