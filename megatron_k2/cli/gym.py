"""``megatron-k2 gym``: what there is to train on, whether it can be believed, and verdicts."""

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_k2.cli import gym_rollouts
from megatron_k2.cli.endpoint import add_model, connected

if TYPE_CHECKING:
    from megatron_k2.gym.admission import Card
    from megatron_k2.gym.protocol import Domain, Task, Verdict

AT_ONCE = 64
"""Answers in work: enough for every worker, and a few that wait."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-k2 gym")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="domains, and generators that can be used here")
    card = verbs.add_parser(
        "card",
        help="admission cards: do a generator's own answers pass, and nothing else",
        description="Exit code 1 where one that was named is refused.",
    )
    card.add_argument("names", nargs="*", metavar="GENERATOR")
    card.add_argument("--all", action="store_true", help="every generator of this machine")
    card.add_argument("--number", type=int, default=30, help="tasks of each (default %(default)s)")
    card.add_argument("--json", action="store_true", help="one card a line")
    sample = verbs.add_parser("sample", help="tasks of a generator, to look at or as a task set")
    sample.add_argument("name", metavar="GENERATOR")
    sample.add_argument("--number", type=int, default=5)
    sample.add_argument("--output", type=Path, metavar="DIR", help="a new task set")
    sample.add_argument("--licence", default="Apache-2.0", help="of the set (default %(default)s)")
    verify = verbs.add_parser(
        "verify",
        help="a task and an answer a line in, verdict and evidence out",
        description='Lines {"task": {...}, "answer": "..."}, or its fields beside the answer; '
        "prompt may be left out, and reference may be a text in mathematics.",
    )
    verify.add_argument("--domain", required=True)
    verify.add_argument("--jsonl", type=Path, required=True, metavar="FILE")
    verify.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    gym_rollouts.add_verbs(verbs)
    for verb in (card, sample):
        verb.add_argument("--seed", type=int, default=7)
    for verb in (card, verify):
        verb.add_argument("--sandbox", help="back-end for programs; default: the strongest")
        verb.add_argument("--workers", type=int, help="processes (default: one a core)")
        verb.add_argument("--cpu-seconds", type=float, help="deadline of a verdict")
        verb.add_argument(
            "--endpoint", metavar="URL", help="of a model that judges, where one is asked"
        )
        add_model(verb)
    return parser


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


async def _open(name: str, arguments: argparse.Namespace) -> "Domain":
    from megatron_k2.gym.registry import ASKED, open_domain
    from megatron_k2.gym.workers import Deadline

    seconds = arguments.cpu_seconds
    deadline = None if seconds is None else Deadline(cpu_seconds=seconds)
    asker = None
    if arguments.endpoint and name in ASKED:
        from megatron_k2.rewards.asker import EndpointAsker

        client, model = await connected(arguments, AT_ONCE)
        asker = EndpointAsker(client, model)
    return await open_domain(
        name,
        num_workers=arguments.workers,
        deadline=deadline,
        sandbox=arguments.sandbox,
        asker=asker,
        tell=_say,
    )


def _list() -> int:
    from megatron_k2.gym.logic import reasoning_gym
    from megatron_k2.gym.registry import DOMAINS, generators
    from megatron_k2.terminal import pairs, show

    show("domains", pairs(DOMAINS.items()))
    names = sorted(generators())
    show(f"{len(names)} generators", pairs((name,) for name in names))
    if problem := reasoning_gym.missing():
        _say(problem)
    return 0


async def _cards(arguments: argparse.Namespace) -> AsyncIterator["Card"]:
    from megatron_k2.errors import UserError
    from megatron_k2.gym.admission import card_of
    from megatron_k2.gym.registry import generator_named, generators

    names = sorted(generators()) if arguments.all else arguments.names
    if not names:
        raise UserError("no generator named; `megatron-k2 gym list` names them, --all takes all")
    if arguments.number < 2:
        raise UserError(f"--number {arguments.number}: a card needs 2 tasks or more")
    domains: dict[str, Domain] = {}
    try:
        for number, name in enumerate(names, start=1):
            if sys.stderr.isatty():
                _say(f"{number} of {len(names)}: {name}")
            generator = generator_named(name)
            if generator.domain not in domains:
                domains[generator.domain] = await _open(generator.domain, arguments)
            domain = domains[generator.domain]
            yield await card_of(generator, domain, arguments.number, arguments.seed)
    finally:
        for domain in domains.values():
            await domain.close()


async def _card(arguments: argparse.Namespace) -> int:
    num_cards = num_admitted = 0
    async for card in _cards(arguments):
        num_cards, num_admitted = num_cards + 1, num_admitted + card.is_admitted
        if arguments.json:
            print(json.dumps(card.as_json()), flush=True)
            continue
        word = "admitted" if card.is_admitted else "REFUSED"
        figures = (
            f"oracle {card.oracle:.0%}, empty {card.empty:.0%}, junk {card.junk:.0%}, "
            f"adversarial {card.adversarial:.0%}, distinct {card.distinct:.0%}, "
            f"{1e3 * card.make_seconds:.1f} ms to make, {1e3 * card.judge_seconds:.1f} ms to judge"
        )
        print(f"{card.name}: {word}; {'; '.join(card.reasons) or figures}", flush=True)
    if not arguments.json:
        print(f"{num_admitted} of {num_cards} admitted")
    return 0 if arguments.all or num_admitted == num_cards else 1


def _sample(arguments: argparse.Namespace) -> int:
    from megatron_k2.errors import UserError
    from megatron_k2.gym.registry import generator_named
    from megatron_k2.gym.task_sets import write_set

    if arguments.number < 1:
        raise UserError(f"--number {arguments.number}: expected 1 or more")
    generator = generator_named(arguments.name)
    drawn = generator.sample(arguments.number, arguments.seed)
    tasks = list({task.id: task for task in drawn}.values())
    if arguments.output is None:
        for task in tasks:
            print(json.dumps(task.as_json(), ensure_ascii=False))
        return 0
    lineage = {"generator": arguments.name, "seed": arguments.seed, "number": arguments.number}
    card = write_set(arguments.output, tasks, arguments.licence, lineage)
    print(f"{arguments.output}: {card.num_tasks} distinct tasks, sha256 {card.content_sha256[:12]}")
    return 0


def _pairs(path: Path, domain: str) -> Sequence[tuple["Task", str]]:
    from megatron_k2.errors import UserError
    from megatron_k2.gym.protocol import task_from
    from megatron_k2.records.read import read_json_line

    if not path.is_file():
        raise UserError(f"{path} is not a file; expected a task and an answer a line, as JSON")
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = read_json_line(line)
            answer = row.pop("answer", None)
            if not isinstance(answer, str):
                raise ValueError(f"answer is {type(answer).__name__}; expected a string")
            task = row.get("task", row)
            if not isinstance(task, dict):
                raise ValueError("task is no object")
            task = {"domain": domain, "prompt": "", **task}
            if isinstance(task.get("reference"), str):
                task["reference"] = {"reference": task["reference"]}
            if task["domain"] != domain:
                raise ValueError(f"a task of {task['domain']!r}; --domain is {domain!r}")
            found.append((task_from(task), answer))
        except ValueError as problem:
            raise UserError(f"{path}:{number}: {problem}") from None
    return found


async def _verify(arguments: argparse.Namespace) -> int:
    from megatron_k2.errors import UserError

    pairs = _pairs(arguments.jsonl, arguments.domain)
    domain = await _open(arguments.domain, arguments)
    free = asyncio.Semaphore(AT_ONCE)

    async def one(task: "Task", answer: str) -> "Verdict":
        async with free:
            return await domain.judge(task, answer)

    counts: dict[str, int] = {}
    with ExitStack() as stack:
        out: Any = sys.stdout
        if arguments.output:
            if not arguments.output.parent.is_dir():
                raise UserError(f"{arguments.output.parent} is not a folder; make it first")
            out = stack.enter_context(arguments.output.open("w", encoding="utf-8"))
        tasks = [asyncio.ensure_future(one(*pair)) for pair in pairs]
        try:
            for (task, _), running in zip(pairs, tasks, strict=True):
                verdict = await running
                counts[verdict.outcome] = counts.get(verdict.outcome, 0) + 1
                row = {
                    **{"id": task.id, "outcome": verdict.outcome, "reward": verdict.reward},
                    **{"evidence": verdict.evidence, "details": dict(verdict.details)},
                    "seconds": verdict.seconds,
                }
                print(json.dumps(row, ensure_ascii=False), file=out, flush=True)
        finally:
            for running in tasks:
                running.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await domain.close()
    _say(", ".join(f"{number} {name}" for name, number in sorted(counts.items())) or "no line")
    return 0


def main(argv: list[str]) -> int:
    """Run one verb of the gym."""
    arguments = _parser().parse_args(argv)
    verbs = {
        "card": lambda given: asyncio.run(_card(given)),
        "difficulty": gym_rollouts.difficulty,
        "list": lambda _: _list(),
        "page": gym_rollouts.page,
        "sample": _sample,
        "verify": lambda given: asyncio.run(_verify(given)),
    }
    return verbs[arguments.verb](arguments)
