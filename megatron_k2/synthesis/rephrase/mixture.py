"""From runs to a mixture: which rewrites go in, as JSONL, indexed datasets and a blend.

Refused: what no model has found faithful (unless told otherwise), rephrasings of a text beyond the
report's two, near duplicates of sources or of other rewrites, and what holds a run of words of an
evaluation set. Everything refused is written down with its reason.
"""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from megatron_k2.data.decontaminate import NGRAM, Evaluations
from megatron_k2.data.dedup import Deduplicator
from megatron_k2.data.parts import Part, Span, read_documents
from megatron_k2.data.prepare import PrepareOptions, prepare
from megatron_k2.data.sources import DEFAULT_SUFFIXES, find_files
from megatron_k2.errors import UserError
from megatron_k2.fidelity.check import Verdict
from megatron_k2.files import commit_file, write_atomically
from megatron_k2.synthesis.rephrase.settings import MOST_REPHRASINGS
from megatron_k2.synthesis.store import Store
from megatron_k2.synthesis.work.job import STORE_FILE, read_job, shard_folder
from megatron_k2.synthesis.work.merge import KEPT_FILE

DOCUMENTS, REFUSED, MIXTURE, BLEND = (
    "documents.jsonl",
    "refused.jsonl",
    "mixture.json",
    "blend.json",
)


@dataclass(frozen=True)
class MixOptions:
    """What goes in.

    Raises:
        UserError: a value is none of those expected.
    """

    runs: tuple[Path, ...]
    output: Path
    accepts_unverified: bool = False
    most_rephrasings: int = MOST_REPHRASINGS
    """Of one text, over all runs."""
    duplicate: float = 0.8
    """Jaccard similarity of runs of five words."""
    against_source: bool = True
    evaluation_sets: tuple[Path, ...] = ()
    ngram: int = NGRAM
    tokenizer: Path | None = None
    """With it indexed datasets are made."""
    weights: tuple[float, ...] = ()
    """Of the blend, one a run; none: by their tokens."""

    def __post_init__(self) -> None:
        names = [run.resolve().name for run in self.runs]
        if len(set(names)) < len(names):
            raise UserError("two runs have one name, which is their domain's; rename a folder")
        if self.most_rephrasings < 1:
            raise UserError(f"--most-rephrasings {self.most_rephrasings}: expected 1 or more")
        if self.weights and len(self.weights) != len(self.runs):
            raise UserError(f"{len(self.weights)} --weights for {len(self.runs)} runs; one each")
        if self.weights and not min(self.weights) > 0:
            raise UserError(f"--weights {min(self.weights):g}: expected more than 0")
        if self.weights and self.tokenizer is None:
            raise UserError("--weights are of a blend of datasets, which --tokenizer makes")


@dataclass
class Domain:
    """What became of one run."""

    name: str
    num_documents: int = 0
    num_tokens: int | None = None
    """Of the indexed dataset, an end token a document; ``None`` where none was made."""
    refused: Counter[str] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)


def mix(options: MixOptions) -> list[Domain]:
    """Write the mixture.

    Raises:
        UserError: a run is not merged yet, an evaluation set cannot be read, or nothing is left.
    """
    filters = _Filters(options)
    found = []
    for run in options.runs:
        domain = Domain(run.resolve().name)
        if options.against_source:
            filters.add_sources(run)
        found.append(domain)
        _write_domain(run, options.output / domain.name, domain, filters)
    if options.tokenizer is not None:
        for domain in found:
            _prepare(options, domain)
        _write_blend(options, found)
    _write_mixture(options, found, filters.evaluations)
    return found


class _Filters:
    """What each record is held against, over all runs."""

    def __init__(self, options: MixOptions) -> None:
        self._options = options
        self._dedup = Deduplicator(options.duplicate)
        self._rephrasings: Counter[str] = Counter()
        self.evaluations = Evaluations(options.ngram)
        if options.evaluation_sets:
            for name, text in _texts(options.evaluation_sets):
                self.evaluations.add(name, text)

    def add_sources(self, run: Path) -> None:
        """Sources of a run, to which its rewrites must not be near duplicates."""
        for name, payload in _items(run):
            self._dedup.add(f"source {name}", str(payload["text"]))

    def refusal(self, record: Mapping[str, Any]) -> tuple[str, str] | None:
        """Kind and reason; ``None``: it goes in."""
        options = self._options
        if record["verdict"] != Verdict.FAITHFUL and not options.accepts_unverified:
            return "unverified", f"the verdict is {record['verdict']}: {record['reason']}"
        if self._rephrasings[record["source_sha256"]] >= options.most_rephrasings:
            return "rephrasings", f"{options.most_rephrasings} of its source are there already"
        if (met := self.evaluations.met_in(record["text"])) is not None:
            return "contaminated", f"{met[0]} has {met[1]!r}"
        if (double := self._dedup.add(record["id"], record["text"])) is not None:
            return "duplicate", f"{double.similarity:.0%} like {double.of}"
        self._rephrasings[record["source_sha256"]] += 1
        return None


def _write_domain(run: Path, folder: Path, domain: Domain, filters: _Filters) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with _whole(folder / DOCUMENTS) as kept, _whole(folder / REFUSED) as refused:
        for line in kept_lines(run):
            record = json.loads(line)
            found = filters.refusal(record)
            if found is None:
                kept.write(line)
                domain.num_documents += 1
                domain.licences[_licence(record)] += 1
            else:
                kind, reason = found
                domain.refused[kind] += 1
                row = {"id": record["id"], "source_id": record["source_id"], "why": kind}
                said = json.dumps({**row, "reason": reason}, ensure_ascii=False)
                refused.write(said + "\n")


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[TextIO]:
    """A file that appears once it is finished."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with temporary.open("w", encoding="utf-8") as out:
        yield out
    commit_file(temporary, path)


def _licence(record: Mapping[str, Any]) -> str:
    return f"source {record['source_licence']}, teacher {record['teacher_licence']}"


def kept_lines(run: Path) -> Iterator[str]:
    """Lines of what a run kept.

    Raises:
        UserError: it is not merged yet.
    """
    path = run / KEPT_FILE
    if not path.is_file():
        raise UserError(f"{run} has no {KEPT_FILE}; run megatron-k2 rephrase run to its end")
    with path.open(encoding="utf-8") as lines:
        yield from lines


def _items(run: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Hash in hexadecimal and payload of every item of a run."""
    for shard in range(read_job(run).num_shards):
        path = shard_folder(run, shard) / STORE_FILE
        with contextlib.closing(Store(path, is_reader=True)) as store:
            for item in store.items():
                yield item.hash.hex(), item.payload


def source_of(run: Path) -> Callable[[str], str]:
    """A function that gives an item's source text by the record's id."""
    num_shards = read_job(run).num_shards
    stores = [Store(shard_folder(run, n) / STORE_FILE, is_reader=True) for n in range(num_shards)]

    def text(name: str) -> str:
        digest = bytes.fromhex(name)
        item = stores[int.from_bytes(digest[:8]) % num_shards].item(digest)
        return "" if item is None else str(item.payload["text"])

    return text


def _texts(paths: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Documents of evaluation sets: of JSON every text of an object, whatever its field."""
    for file in find_files(list(paths), (*DEFAULT_SUFFIXES, ".json")):
        if file.is_json:
            yield from _fields(file.path)
        else:
            part = Part(0, (Span(file, 0, max(file.num_bytes, 1), 0.0),))
            for _, document in read_documents(part, "text"):
                yield document.id, document.text


def _fields(path: Path) -> Iterator[tuple[str, str]]:
    from megatron_k2.data.kinds import kind_of, opened, read_array

    if kind_of(path) == "array":
        rows: Iterable[Any] = read_array(path)
    else:
        with opened(path) as stream:
            lines = [line for line in stream if line.strip()]
        try:
            rows = [json.loads(line) for line in lines]
        except ValueError as error:
            raise UserError(f"{path}: not a JSON object a line ({error})") from None
    for number, row in enumerate(rows, start=1):
        for text in _strings(row):
            yield f"{path.name}:{number}", text


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


def _prepare(options: MixOptions, domain: Domain) -> None:
    if not domain.num_documents:
        return
    folder = options.output / domain.name
    manifest = prepare(
        PrepareOptions(
            output=folder / "dataset",
            inputs=(folder / DOCUMENTS,),
            tokenizer=options.tokenizer,
            validation_fraction=0.0,
        )
    )
    domain.num_tokens = manifest.splits["train"].num_tokens


def _write_blend(options: MixOptions, domains: list[Domain]) -> None:
    """Megatron's ``--per-split-data-args-path``, which a recipe's ``data.file`` names."""
    given = options.weights or tuple(float(domain.num_tokens or 0) for domain in domains)
    words = []
    for domain, weight in zip(domains, given, strict=True):
        if domain.num_tokens:
            prefix = options.output.resolve() / domain.name / "dataset" / "train"
            words += [f"{weight:g}", str(prefix)]
    if not words:
        raise UserError(f"no document is left of {len(domains)} runs; see {REFUSED} in each folder")
    write_atomically(
        options.output / BLEND,
        json.dumps({"train": words, "valid": None, "test": None}, indent=1).encode(),
    )


def _write_mixture(options: MixOptions, domains: list[Domain], known: Evaluations) -> None:
    record = {
        "schema_version": 1,
        "accepts_unverified": options.accepts_unverified,
        "most_rephrasings": options.most_rephrasings,
        "duplicate": options.duplicate,
        "against_source": options.against_source,
        "ngram": options.ngram,
        "evaluation_texts": known.num_texts,
        "evaluation_texts_too_short": known.num_too_short,
        "domains": {
            each.name: {
                "documents": each.num_documents,
                "tokens": each.num_tokens,
                "refused": dict(each.refused),
                "licences": dict(each.licences),
            }
            for each in domains
        },
    }
    text = json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False)
    write_atomically(options.output / MIXTURE, text.encode())
