"""``megatron-k2 rephrase report`` and ``mix``: what a run made, and what goes into training."""

import argparse
from typing import TYPE_CHECKING

from megatron_k2.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from megatron_k2.synthesis.rephrase.report import Summary

type Rows = list[list[str]]


def report(arguments: argparse.Namespace) -> int:
    """Print the numbers; write the page."""
    from megatron_k2.files import write_atomically
    from megatron_k2.run.report.page import comparison_page
    from megatron_k2.synthesis.rephrase.report import examples, summarized
    from megatron_k2.terminal import show, table

    if arguments.examples < 0:
        raise UserError(f"--examples {arguments.examples}: expected 0 or more")
    summary = summarized(arguments.run)
    every = [*_tables(summary), ("tokens and cost", _costs(arguments))]
    tables = [(title, rows) for title, rows in every if len(rows) > 1]
    for title, rows in tables:
        listed = table(*rows[0], title=title)
        for row in rows[1:]:
            listed.add_row(*row)
        show(listed)
    if arguments.html is not None:
        title = f"{arguments.run.resolve().name}: {summary.keep_rate:.1%} kept"
        page = comparison_page(title, examples(arguments.run, arguments.examples), tables)
        write_atomically(arguments.html, page.encode())
        print(f"{arguments.html}: examples side by side")
    return 0


def _tables(summary: "Summary") -> "Iterator[tuple[str, Rows]]":
    total = max(summary.num_kept + summary.num_rejected, 1)
    stages: Rows = [["", "documents", "share"]]
    for name, number in (
        *((f"kept: {verdict}", n) for verdict, n in sorted(summary.verdicts.items())),
        *((f"rejected: {stage}", n) for stage, n in summary.stages.most_common()),
    ):
        stages.append([name, f"{number:,}", f"{number / total:.1%}"])
    yield "what became of them", stages
    signals: Rows = [["signal", "kept", "rejected"]]
    for name, (kept, rejected) in sorted(summary.signals.items()):
        signals.append([name, f"{kept:,}", f"{rejected:,}"])
    yield "surface signals", signals
    if (length := summary.length) is not None:
        yield (
            "tokens over source's",
            [["10 %", "median", "90 %"], [f"{each:.2f}" for each in length]],
        )
    diversity: Rows = [["of the same number of texts", "rewrites", "sources"]]
    for name, pair in summary.diversity.items():
        diversity.append([name, *("" if each is None else f"{each:.3f}" for each in pair)])
    yield "diversity", diversity
    prompts: Rows = [["prompt", "documents", "kept"]]
    for name, (kept, all_) in sorted(summary.prompts.items()):
        prompts.append([name, f"{all_:,}", f"{kept / all_:.0%}"])
    yield "keep rate by prompt", prompts


def _costs(arguments: argparse.Namespace) -> Rows:
    from megatron_k2.synthesis.llm.ledger import Prices
    from megatron_k2.synthesis.work.job import read_job
    from megatron_k2.synthesis.work.merge import used_of

    job = read_job(arguments.run)
    rows: Rows = [["model", "requests", "prompt tokens", "completion tokens", "cost"]]
    own = Prices(arguments.prompt_price, arguments.completion_price)
    check = Prices(arguments.check_prompt_price, arguments.check_completion_price)
    for model, used in used_of(arguments.run, job).items():
        cost = (own if model == job.settings.get("model") else check).cost(*used[1:])
        rows.append([model, *(f"{each:,}" for each in used), f"{cost:,.2f}"])
    return rows


def mix(arguments: argparse.Namespace) -> int:
    """Write the mixture; 1 where a run has nothing that goes in."""
    from megatron_k2.synthesis.rephrase.mixture import BLEND, MIXTURE, MixOptions
    from megatron_k2.synthesis.rephrase.mixture import mix as mixed
    from megatron_k2.synthesis.rephrase.settings import MOST_REPHRASINGS
    from megatron_k2.terminal import show, table

    if arguments.most_rephrasings > MOST_REPHRASINGS:
        print(
            f"note: --most-rephrasings {arguments.most_rephrasings}: the report rephrases a corpus "
            f"at most {MOST_REPHRASINGS} times in production (section 2.2)"
        )
    weights: Sequence[float] = arguments.weights or ()
    domains = mixed(
        MixOptions(
            runs=tuple(arguments.runs),
            output=arguments.output,
            accepts_unverified=arguments.accept_unverified,
            most_rephrasings=arguments.most_rephrasings,
            duplicate=arguments.duplicate,
            against_source=not arguments.without_source,
            evaluation_sets=tuple(arguments.decontaminate),
            ngram=arguments.ngram,
            tokenizer=arguments.tokenizer,
            weights=tuple(weights),
        )
    )
    rows = table("domain", "documents", "tokens", "refused", "why")
    for each in domains:
        tokens = "" if each.num_tokens is None else f"{each.num_tokens:,}"
        why = ", ".join(f"{kind} {number:,}" for kind, number in each.refused.most_common())
        refused = f"{each.refused.total():,}"
        rows.add_row(each.name, f"{each.num_documents:,}", tokens, refused, why)
    show(rows)
    print(f"{arguments.output / MIXTURE}: licences, counts and options")
    if arguments.tokenizer is not None:
        print(f"{arguments.output / BLEND}: for a recipe's --set data.file=")
    return int(any(not each.num_documents for each in domains))
