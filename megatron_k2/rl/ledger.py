"""What a run has drawn, sampled and trained on: the one owner of which prompt is where.

Records, in ``journal.py``'s file:

    run         what may not change: seed, size of a group, task sets
    begin       an iteration, its version of the weights, the prompts that were drawn for it
    answer      one finished answer, a failure or a time-out as well: never decided again, unless
                it turns out to lie beyond the cut, where nothing has happened yet
    iteration   the cut: groups that are trained on, with their rewards; answers left unfinished
    evaluation  what held-out prompts gave

An iteration whose ``iteration`` record is there was handed out, and is handed out again, the same,
to a learner that resumes from a checkpoint before it. So nothing is committed here when a
checkpoint is: the checkpoint says how many iterations it holds, and ``position`` which ledger they
are of. What lies after the last such record was the iteration under way: its answers are kept, the
rest of it is sampled again, from the last cut.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.lock.directory import hold
from megatron_k2.records.rollouts import JUDGED
from megatron_k2.rl.answers import Answer, segments_from, segments_to_payload
from megatron_k2.rl.curriculum import Prompt, Stream
from megatron_k2.rl.handed_out import HandedOut
from megatron_k2.rl.in_play import Finished, FinishedGroup, OpenGroup, open_group_from
from megatron_k2.rl.journal import Journal, Sizes
from megatron_k2.rl.journal_reader import Ref
from megatron_k2.rl.record import Segment

SCHEMA_VERSION = 2


class Ledger(HandedOut[Journal]):
    """Open, with what it holds played into the stream of prompts.

    Args:
        folder: of the run; one process at a time.
        stream: new; it learns what the ledger knows.
        terms: what may not change in a run beside the task sets: ``seed``, ``group_size``.
        tell: is called with sentences of what was mended.

    Raises:
        UserError: another process is at it, it is damaged, or it is of other terms.
    """

    def __init__(
        self,
        folder: Path,
        stream: Stream,
        terms: Mapping[str, int],
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._held = ExitStack()
        self._held.enter_context(hold(folder, "reinforcement learning"))
        super().__init__(Journal(folder, tell))
        self._folder, self._stream, self._tell = folder, stream, tell
        self.open_groups: dict[int, OpenGroup] = {}
        """By ordinal: all that were drawn and not trained on."""
        self.finished: defaultdict[int, dict[int, Finished]] = defaultdict(dict)
        """By ordinal, by k: answers of the iteration under way."""
        self._group_size = terms["group_size"]
        self._evaluations: dict[int, int] = {}
        self._begun: dict[str, Any] | None = None
        self._next_ordinal = 0
        fingerprints = {each.name: each.fingerprint for each in stream.task_sets.values()}
        self._start({"schema_version": SCHEMA_VERSION, **terms, "task_sets": fingerprints})

    def _start(self, run: dict[str, Any]) -> None:
        for number, record in self._journal.records():
            if record["kind"] == "run":
                self._check_terms(record, run)
            else:
                self._learn(number, record)
        if not self._journal.num_records:
            self._journal.append({"kind": "run", **run})

    def _check_terms(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        for name, value in wanted.items():
            if found.get(name) != value:
                raise UserError(
                    f"{self._folder} holds a run of {name} {found.get(name)}, not {value}; give it "
                    "as it was, or a new run a new folder"
                )

    def _learn(self, number: int, record: dict[str, Any]) -> None:
        """What a record changes: the one place, for those read and those written."""
        match record["kind"]:
            case "begin":
                self._begun = record
                for row in record["prompts"]:
                    prompt = Prompt(**row)
                    self._stream.drawn(prompt)
                    self.open_groups[prompt.ordinal] = OpenGroup(prompt)
                    self._next_ordinal = prompt.ordinal + 1
            case "answer":
                ref = Ref(*record["answer"])
                finished = Finished(record["num_steps"], ref)
                self.finished[record["ordinal"]][record["k"]] = finished
            case "iteration":
                self._iterations.append(number)
                for row in record["groups"]:
                    prompt = Prompt(**row["prompt"])
                    self._stream.answered(prompt, row["verdicts"], row["lengths"])
                groups = map(open_group_from, record["open"])
                self.open_groups = {each.prompt.ordinal: each for each in groups}
                self.finished.clear()
                self._begun = None
            case "evaluation":
                self._evaluations[record["iteration"]] = number

    def _add(self, record: dict[str, Any], *, is_durable: bool = True) -> None:
        self._learn(self._journal.append(record, is_durable=is_durable), record)

    @property
    def next_ordinal(self) -> int:
        """Of the prompt that is drawn next."""
        return self._next_ordinal

    @property
    def cursor(self) -> int:
        """The oldest ordinal that no iteration has trained on."""
        return min(self.open_groups, default=self._next_ordinal)

    def begin(self, iteration: int, version: int, prompts: Iterable[Prompt]) -> None:
        """An iteration starts with new prompts."""
        rows = [dict(vars(prompt)) for prompt in prompts]
        self._add({"kind": "begin", "iteration": iteration, "version": version, "prompts": rows})

    @property
    def begun_version(self) -> int | None:
        """Of the iteration under way; ``None``: there is none."""
        return None if self._begun is None else int(self._begun["version"])

    def answer(self, prompt: Prompt, k: int, num_steps: int, answer: Answer) -> None:
        """An answer is finished; durable with the last of its group, or where it failed."""
        ref = self._journal.put(self.num_iterations, answer.to_payload())
        row = {"ordinal": prompt.ordinal, "k": k, "num_steps": num_steps, "answer": ref}
        group = self.open_groups[prompt.ordinal]
        num_known = len(group.answers.keys() | self.finished[prompt.ordinal].keys() | {k})
        self._add(
            {"kind": "answer", **row, "end": answer.end, "reason": answer.reason},
            is_durable=num_known == self._group_size or answer.end not in JUDGED,
        )

    def finished_answer(self, prompt: Prompt, k: int) -> tuple[int, Answer] | None:
        """Steps and content of an answer that the iteration under way has; ``None``: it has none.

        One whose payload a power cut took was handed out to nobody: it is played again.
        """
        found = self.finished[prompt.ordinal].get(k)
        if found is None:
            return None
        try:
            return found.num_steps, self.read_answer(found.ref)
        except UserError as problem:
            self._tell(f"answer {k} to prompt {prompt.ordinal} is played again: {problem}")
            return None

    def keep(self, segments: tuple[Segment, ...]) -> Ref:
        """A beginning that is to be resumed; durable with the next record."""
        return self._journal.put(self.num_iterations, segments_to_payload(segments))

    def end(
        self,
        version: int,
        groups: Iterable[FinishedGroup],
        still_open: Iterable[OpenGroup],
        facts: Mapping[str, Any],
    ) -> None:
        """The cut: what is trained on, what goes on, and what is to be told of it."""
        self._add(
            {
                "kind": "iteration",
                "iteration": self.num_iterations,
                "version": version,
                "facts": dict(facts),
                "groups": [each.to_object() for each in groups],
                "open": [each.to_object() for each in still_open],
            }
        )

    def read_state(self, ref: Ref) -> tuple[Segment, ...]:
        """One that was cut off."""
        return segments_from(self._journal.get(ref))

    def evaluated(self, iteration: int, results: Mapping[str, Any]) -> None:
        """Held-out prompts were tried with the weights that iteration starts from."""
        self._add({"kind": "evaluation", "iteration": iteration, "results": dict(results)})

    def evaluation(self, iteration: int) -> dict[str, Any] | None:
        """What they gave; ``None``: not tried."""
        number = self._evaluations.get(iteration)
        return None if number is None else self._journal.record(number)["results"]

    def sizes(self) -> Sizes:
        """What it takes on disk."""
        return self._journal.sizes()

    def prune(self, oldest: int) -> int:
        """Remove payloads that no checkpoint needs.

        Args:
            oldest: iteration that the oldest checkpoint kept goes on with.

        Returns:
            Bytes that were removed.
        """
        needed = {ref[0] for ref in self._refs(oldest)}
        return self._journal.remove(set(self._journal.segments()) - needed)

    def _refs(self, oldest: int) -> Iterable[tuple[Any, ...]]:
        """Of all that may still be read."""
        for number in self._iterations[oldest:]:
            for row in self._journal.record(number)["groups"]:
                yield from row["answers"]
        for group in self.open_groups.values():
            yield from (*group.answers.values(), *group.states.values())
        yield from (each.ref for row in self.finished.values() for each in row.values())

    def close(self) -> None:
        """Let another process have it."""
        self._journal.close()
        self._held.close()
