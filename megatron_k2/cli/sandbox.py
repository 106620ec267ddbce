"""``megatron-k2 sandbox check``: what gets out of which back-end on this machine."""

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_k2.sandbox.escapes.judge import Verdict
    from megatron_k2.sandbox.escapes.read import Escape


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-k2 sandbox")
    verbs = parser.add_subparsers(dest="verb", required=True)
    check = verbs.add_parser(
        "check",
        help="run programs that try to get out",
        description="Runs the escape suite, and programs of yours, in each back-end that this "
        "machine has. Exit code 1 where the back-end asked for, or the default one, does not hold.",
    )
    check.add_argument("--backend", help="bwrap or sandlock; default: all, and which is chosen")
    check.add_argument(
        "--programs",
        type=Path,
        metavar="FILE.jsonl",
        help="a JSON object a line: name, code (Python), must (blocked, killed or allowed); these "
        "are run instead of the suite, and HO_* variables of the environment are handed to them",
    )
    check.add_argument("--json", action="store_true", help="one verdict a line")
    return parser


def _tried(name: str, escapes: list["Escape"], *, is_suite: bool) -> list["Verdict"]:
    from megatron_k2.sandbox.choose import backend_named, keep_verdict
    from megatron_k2.sandbox.escapes.judge import try_all

    def tell(number: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if number == len(escapes) else "\r"
            print(f"{name}: {number} of {len(escapes)} programs", end=end, file=sys.stderr)

    backend = backend_named(name)
    verdicts = asyncio.run(try_all(backend, escapes, tell))
    if is_suite:
        keep_verdict(backend, verdicts)
    return verdicts


def _report(name: str, verdicts: list["Verdict"], *, as_json: bool) -> bool:
    """Print one back-end's verdicts; whether it held."""
    from dataclasses import asdict

    escaped = [verdict for verdict in verdicts if not verdict.has_held]
    if as_json:
        for verdict in verdicts:
            print(json.dumps({"backend": name, **asdict(verdict)}))
    else:
        held = len(verdicts) - len(escaped)
        print(f"{name}: held {held} of {len(verdicts)} programs")
        for verdict in escaped:
            print(f"  {verdict.name} ({verdict.must}): {verdict.why}")
    return not escaped


def main(argv: list[str]) -> int:
    """Check one back-end or all; 0 where the one that would be used holds."""
    from megatron_k2.errors import UserError
    from megatron_k2.sandbox.choose import SANDBOXES, STRONGEST_FIRST
    from megatron_k2.sandbox.escapes.read import escapes_in, suite

    arguments = _parser().parse_args(argv)
    if arguments.backend == "bare":
        raise UserError(
            "bare confines nothing: the suite would do to this machine what it tries; "
            f"check one of: {', '.join(STRONGEST_FIRST)}"
        )
    is_suite = arguments.programs is None
    escapes = suite() if is_suite else escapes_in(arguments.programs)
    chosen, problems = None, []
    for name in [arguments.backend] if arguments.backend else STRONGEST_FIRST:
        problem = SANDBOXES[name]().missing() if name in SANDBOXES else None
        if problem and not arguments.backend:
            problems.append(f"{name}: {problem}")
            print(f"{name}: cannot run here: {problem}", file=sys.stderr)
            continue
        verdicts = _tried(name, escapes, is_suite=is_suite)
        if _report(name, verdicts, as_json=arguments.json) and chosen is None:
            chosen = name
    if len(problems) == len(STRONGEST_FIRST):
        raise UserError(f"no sandbox can run on this machine; {'; '.join(problems)}")
    if not arguments.json:
        print(f"chosen: {chosen}" if chosen else "none holds")
    return 0 if chosen else 1
