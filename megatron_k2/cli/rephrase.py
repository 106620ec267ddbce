"""``megatron-k2 rephrase plan | run | report | mix | score | calibrate``."""

import argparse
import importlib
from pathlib import Path
from typing import Any

from megatron_k2.cli.endpoint import add_model

VERBS = {
    "plan": "rephrase_run",
    "run": "rephrase_run",
    "report": "rephrase_report",
    "mix": "rephrase_report",
    "score": "rephrase_pairs",
    "calibrate": "rephrase_pairs",
}
"""Verb to the module that has a function of its name."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-k2 rephrase",
        description="Pretraining text said again by a model, held to its source.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    plan = verbs.add_parser(
        "plan",
        help="documents, pieces, requests, tokens, cost; asks nothing",
        description="Takes a run's flags, of which output and endpoint may be left out.",
    )
    _add_what(plan)
    _add_how(plan, is_needed=False)
    run = verbs.add_parser(
        "run", help="rewrite and judge", description="Killed and run again, it goes on."
    )
    _add_what(run)
    _add_how(run, is_needed=True)
    report = verbs.add_parser("report", help="what was kept and why not; an HTML page")
    report.add_argument("run", type=Path, metavar="DIR", help="the --output of a run")
    report.add_argument("--html", type=Path, metavar="FILE.html", help="examples side by side")
    report.add_argument("--examples", type=int, default=200, help="on it (default %(default)s)")
    _add_prices(report)
    _add_mix(verbs)
    _add_pairs(verbs)
    return parser


def _add_what(command: argparse.ArgumentParser) -> None:
    from megatron_k2.data.sources import DEFAULT_SUFFIXES
    from megatron_k2.synthesis.rephrase.pieces import EXCERPT_TOKENS, PIECE_TOKENS

    add = command.add_argument
    add("--input", type=Path, nargs="+", required=True, metavar="PATH", help="as of data prepare")
    add("--suffix", nargs="+", default=list(DEFAULT_SUFFIXES), help="files taken from directories")
    add("--json-key", default="text", metavar="KEY", help="(default %(default)s)")
    add("--kind", default="knowledge", help="knowledge (default), mathematics or translation")
    add(
        "--style-set", default="", metavar="NAME", help="one of ours or a file; default: the kind's"
    )
    add("--rephrasings", type=int, default=1, help="of each document (default 1; the report: 2)")
    add("--piece-tokens", type=int, default=PIECE_TOKENS, help="(default %(default)s)")
    add("--excerpt-tokens", type=int, default=EXCERPT_TOKENS, help="(default %(default)s)")
    add("--tokenizer", metavar="PATH", help="whose tokens are counted; default: an estimate")
    add("--seed", type=int, default=0)
    _add_prices(command)


def _add_prices(command: argparse.ArgumentParser) -> None:
    for whose in ("", "check-"):
        for what in ("prompt", "completion"):
            name = f"--{whose}{what}-price"
            command.add_argument(name, type=float, default=0.0, help="of a million tokens")


def _add_how(command: argparse.ArgumentParser, *, is_needed: bool) -> None:
    add = command.add_argument
    add("--output", type=Path, required=is_needed, metavar="DIR")
    add("--endpoint", metavar="URL", required=is_needed, help="of the model that rewrites")
    add_model(command)
    add("--temperature", type=float, default=0.7, help="(default %(default)s)")
    add("--top-p", type=float, default=0.95, help="(default %(default)s)")
    add("--no-check", action="store_true", help="every verdict is then unverified")
    add("--check-endpoint", metavar="URL", help="of the model that checks; default: the same")
    add("--check-model", help="default: the model that rewrites")
    add("--check-api-key-env", metavar="NAME")
    add("--votes", type=int, default=5, help="on one statement at most (default %(default)s)")
    add("--extracts", action="store_true", help="let the model list statements first")
    add("--calibration", type=Path, metavar="FILE.json", help="of rephrase calibrate --endpoint")
    add("--source-licence", default="not stated", help="of the texts")
    add("--teacher-licence", default="not stated", help="terms of the model's output")
    add("--engine", default="local", help="local (default), slurm or ray")
    add("--shards", type=int, help="default: one a core, of Slurm and Ray 16")
    add("--concurrency", type=int, default=64, help="requests at one time (default %(default)s)")
    add("--profile", type=Path, metavar="FILE.yaml", help="of the cluster, for --engine slurm")
    add("--dry-run", action="store_true", help="with --engine slurm: print the script alone")


def _add_mix(verbs: Any) -> None:
    mix = verbs.add_parser("mix", help="what was kept, as datasets and a blend for recipes")
    add = mix.add_argument
    add("runs", type=Path, nargs="+", metavar="DIR", help="outputs of runs, a domain each")
    add("--output", type=Path, required=True, metavar="DIR")
    add("--accept-unverified", action="store_true", help="take what no model has checked")
    add("--most-rephrasings", type=int, default=2, help="of a document (default 2, the report's)")
    add("--without-source", action="store_true", help="do not hold rewrites against their source")
    add("--decontaminate", type=Path, nargs="+", default=[], metavar="PATH", help="test sets")
    add("--ngram", type=int, default=13, help="words in a row that must not be in them")
    add("--duplicate", type=float, default=0.8, help="Jaccard similarity that is one too many")
    add("--tokenizer", type=Path, metavar="PATH", help="with it, indexed datasets are made")
    add("--weights", type=float, nargs="+", help="of the blend, one a run; default: by tokens")


def _add_pairs(verbs: Any) -> None:
    score = verbs.add_parser("score", help="score labelled pairs: kinds and AUC")
    calibrate = verbs.add_parser("calibrate", help="a threshold from labelled pairs of your own")
    for command in (score, calibrate):
        add = command.add_argument
        add("--pairs", type=Path, required=True, metavar="FILE.jsonl")
        add("--endpoint", metavar="URL", help="of a model that checks; without: advisory scores")
        add_model(command)
        add("--votes", type=int, default=5, help="(default %(default)s)")
        add("--extracts", action="store_true", help="let the model list statements first")
        add("--concurrency", type=int, default=64, help="(default %(default)s)")
    score.add_argument("--output", type=Path, metavar="FILE.jsonl", help="scores, a line a pair")
    calibrate.add_argument("--output", type=Path, metavar="FILE.json", help="for run --calibration")
    calibrate.add_argument("--keep", type=float, default=0.8, help="of the faithful (default 0.8)")


def main(argv: list[str]) -> int:
    """Run a verb."""
    arguments = _parser().parse_args(argv)
    module = importlib.import_module(f"megatron_k2.cli.{VERBS[arguments.verb]}")
    return int(getattr(module, arguments.verb)(arguments))
