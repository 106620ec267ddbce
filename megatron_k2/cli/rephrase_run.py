"""``megatron-k2 rephrase plan`` and ``run``."""

import argparse
import asyncio
import contextlib
import errno
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_k2.cli.endpoint import connected
from megatron_k2.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from megatron_k2.synthesis.rephrase.settings import Settings
    from megatron_k2.synthesis.work.job import Job

SHARDS_ELSEWHERE = 16


def plan(arguments: argparse.Namespace) -> int:
    """Print what a run would ask."""
    from megatron_k2.synthesis.llm.ledger import Prices
    from megatron_k2.synthesis.rephrase.plan import planned
    from megatron_k2.terminal import show, table

    check = None if arguments.no_check else arguments.check_model or ""
    settings = _settings(arguments, arguments.model or "", check)
    found = planned(settings)
    if not found.num_documents:
        raise UserError(f"--input {arguments.input[0]}: no document with text")
    print(
        f"{found.num_documents:,} documents of {found.source_tokens:,} tokens"
        f"{'' if settings.tokenizer else ' (estimated)'}, {settings.rephrasings} rephrasings each "
        f"by one of {len(settings.prompts())} prompts: {found.num_excerpts:,} excerpts, "
        f"{found.num_pieces:,} pieces, {found.num_copied:,} of them code that is copied"
    )
    rows = table("", "requests", "prompt tokens", "completion tokens", "cost")
    own = Prices(arguments.prompt_price, arguments.completion_price)
    check = Prices(arguments.check_prompt_price, arguments.check_completion_price)
    for name, prices, numbers in (
        ("rewrite", own, (found.requests, found.prompt_tokens, found.completion_tokens)),
        ("check", check, (
            found.check_requests, found.check_prompt_tokens, found.check_completion_tokens)),
    ):  # fmt: skip
        cost = prices.cost(*numbers[1:])
        rows.add_row(name, *(f"{each:,}" for each in numbers), f"{cost:,.2f}")
    show(rows)
    _warn(settings)
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Rewrite, judge, merge; 1 where items had no answer, 130 where it was stopped."""
    from megatron_k2.lock.directory import hold
    from megatron_k2.synthesis.work.job import begin, distribute

    if arguments.engine not in ENGINES:
        raise UserError(f"--engine {arguments.engine}: expected one of {', '.join(ENGINES)}")
    if arguments.concurrency < 1:
        raise UserError(f"--concurrency {arguments.concurrency}: expected 1 or more")
    job = _job(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with hold(arguments.output, "rephrasing"), _full_disk_told(arguments.output):
        begin(arguments.output, job)
        distribute(arguments.output, job, job.made_task())
        is_whole = ENGINES[arguments.engine](arguments, job)
        if not is_whole:
            return 0 if arguments.engine == "slurm" else 130
        return _ended(arguments, job)


@contextlib.contextmanager
def _full_disk_told(folder: Path) -> "Iterator[None]":
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{folder}: {error.strerror}; what was committed is kept, so make room and run the "
            "same command again"
        ) from None


def _job(arguments: argparse.Namespace) -> "Job":
    from megatron_k2.synthesis.rephrase.task import TASK
    from megatron_k2.synthesis.work.job import Job

    model = asyncio.run(_model(arguments))
    check = None if arguments.no_check else arguments.check_model or model
    settings = _settings(arguments, model, check)
    _warn(settings)
    given = {
        "endpoint": arguments.endpoint,
        "api_key_env": arguments.api_key_env,
        "check_endpoint": arguments.check_endpoint,
        "check_api_key_env": arguments.check_api_key_env,
    }
    is_here = arguments.engine == "local"
    shards = arguments.shards or ((os.cpu_count() or 1) if is_here else SHARDS_ELSEWHERE)
    options = {name: value for name, value in given.items() if value is not None}
    return Job(TASK, settings.to_object(), shards, options)


async def _model(arguments: argparse.Namespace) -> str:
    client, model = await connected(arguments, 1)
    await client.close()
    return model


def _settings(arguments: argparse.Namespace, model: str, check: str | None) -> "Settings":
    from megatron_k2.synthesis.rephrase.settings import Settings

    names = ("temperature", "top_p", "extracts", "source_licence", "teacher_licence")
    more = {name: getattr(arguments, name) for name in names}
    return Settings(
        inputs=tuple(str(path) for path in arguments.input),
        model=model,
        check_model=check,
        kind=arguments.kind,
        style_set=arguments.style_set,
        rephrasings=arguments.rephrasings,
        seed=arguments.seed,
        piece_tokens=arguments.piece_tokens,
        excerpt_tokens=arguments.excerpt_tokens,
        tokenizer=arguments.tokenizer,
        json_key=arguments.json_key,
        suffixes=tuple(arguments.suffix),
        num_votes=arguments.votes,
        least_support=0.0 if arguments.calibration is None else _threshold(arguments),
        **more,
    )


def _threshold(arguments: argparse.Namespace) -> float:
    path = arguments.calibration
    try:
        found = json.loads(path.read_text("utf-8"))
        threshold, of = float(found["threshold"]), found["score"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--calibration {path}: expected what rephrase calibrate wrote") from None
    if of == "advisory":
        raise UserError(
            f"--calibration {path} is of advisory scores, which decide nothing; calibrate with "
            "--endpoint"
        )
    return threshold


def _warn(settings: "Settings") -> None:
    for warning in settings.warnings:
        print(f"note: {warning}", file=sys.stderr)


def _local(arguments: argparse.Namespace, job: "Job") -> bool:
    from megatron_k2.synthesis.work.local import run_local

    return run_local(arguments.output, job, arguments.concurrency)


def _ray(arguments: argparse.Namespace, job: "Job") -> bool:
    from megatron_k2.synthesis.work.ray_engine import run_on_ray

    return run_on_ray(arguments.output.resolve(), job, arguments.concurrency)


def _slurm(arguments: argparse.Namespace, job: "Job") -> bool:
    """Submit the shards that have items left; none has: it is whole."""
    from megatron_k2.launch.array import render_array
    from megatron_k2.launch.cluster import Cluster, read_profile
    from megatron_k2.launch.jobs import give_to_sbatch
    from megatron_k2.synthesis.work.local import worker_command
    from megatron_k2.synthesis.work.merge import shards_left

    left = shards_left(arguments.output, job)
    if not left:
        return True
    cluster = Cluster() if arguments.profile is None else read_profile(arguments.profile)
    each = max(arguments.concurrency // len(left), 1)
    words, flags = worker_command(arguments.output.resolve(), each)
    name = f"rephrase-{arguments.output.resolve().name}"
    script = render_array(name, arguments.output, words, flags, left, cluster)
    if arguments.dry_run:
        print(script, end="")
        return False
    number = give_to_sbatch(script, str(arguments.output), "array.sbatch")
    print(f"job {number}: {len(left)} shards; the same command merges them once it has ended")
    return False


def _ended(arguments: argparse.Namespace, job: "Job") -> int:
    """Merge and say what there is."""
    from megatron_k2.synthesis.work.merge import (
        KEPT_FILE,
        counts_of,
        first_failure,
        merge,
        used_of,
    )

    counts: Any = counts_of(arguments.output, job)
    merge(arguments.output, job)
    done = counts["kept"] + counts["rejected"]
    print(
        f"{arguments.output / KEPT_FILE}: {counts['kept']:,} kept, {counts['rejected']:,} rejected "
        f"of {counts['items']:,} ({counts['kept'] / max(done, 1):.1%}); {counts['doubles']:,} "
        "sources were another's double"
    )
    for model, used in used_of(arguments.output, job).items():
        print(
            f"{model}: {used.num_requests:,} requests, {used.prompt_tokens:,} prompt and "
            f"{used.completion_tokens:,} completion tokens"
        )
    if left := counts["items"] - done:
        reason = json.loads(first_failure(arguments.output, job) or '{"reason": "unknown"}')
        print(
            f"{left:,} had no answer, first: {reason['reason']}; the same command asks again",
            file=sys.stderr,
        )
    return int(left > 0)


ENGINES = {"local": _local, "slurm": _slurm, "ray": _ray}
"""What works on all shards; whether they have all been worked through."""
