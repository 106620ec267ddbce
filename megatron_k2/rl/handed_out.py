"""What a ledger has handed out to a trainer, by whoever writes it or reads it beside the writer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.rl.answers import Answer, answer_from
from megatron_k2.rl.curriculum import Prompt
from megatron_k2.rl.journal_reader import JournalReader, Position, Ref
from megatron_k2.rl.plan import Iteration
from megatron_k2.rl.record import Group, Trajectory


class HandedOut[J: JournalReader]:
    """Iterations of groups.

    Args:
        journal: of the ledger.
    """

    def __init__(self, journal: J) -> None:
        self._journal = journal
        self._iterations: list[int] = []
        """Numbers of their records."""

    @property
    def num_iterations(self) -> int:
        """That were handed out, or can be."""
        return len(self._iterations)

    def iteration(self, number: int, *, is_replayed: bool) -> Iteration:
        """What is handed out, now or again."""
        record = self._journal.record(self._iterations[number])
        groups = tuple(self._group(row) for row in record["groups"])
        return Iteration(number, record["version"], groups, record["facts"], is_replayed)

    def _group(self, row: Mapping[str, Any]) -> Group:
        found = []
        for ref, (reward, parts) in zip(row["answers"], row["scores"], strict=True):
            answer = self.read_answer(Ref(*ref))
            found.append(Trajectory(answer.segments, reward, parts, answer.end, answer.reason))
        prompt = Prompt(**row["prompt"])
        return Group(prompt.ordinal, prompt.task_set, prompt.task_id, tuple(found))

    def read_answer(self, ref: Ref) -> Answer:
        """One that was finished."""
        return answer_from(self._journal.get(ref))

    def position(self, num_iterations: int) -> dict[str, Any]:
        """For a checkpoint that has trained on so many iterations: which ledger they are of.

        JSON. It belongs inside the checkpoint, so that both are taken over by the same rename.
        """
        num_lines = self._iterations[num_iterations - 1] + 1 if num_iterations else 1
        return {
            "num_iterations": num_iterations,
            **self._journal.position(num_lines)._asdict(),
        }

    def check_position(self, position: Mapping[str, Any]) -> int:
        """The iteration that a learner goes on with from a checkpoint of that position.

        Raises:
            UserError: the checkpoint is not of this ledger, or knows more than it.
        """
        place = Position(int(position["num_lines"]), str(position["chain"]))
        if not self._journal.has(place):
            raise UserError(
                f"{self._journal.folder} is not the ledger of this checkpoint, or lost what was in "
                f"it ({place.num_lines} records then, {self._journal.num_records} now); give "
                "the folder that belongs to it"
            )
        return int(position["num_iterations"])


class LedgerReader(HandedOut[JournalReader]):
    """A ledger that another process writes.

    Args:
        folder: of the ledger; it may be empty yet.

    Raises:
        UserError: it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(JournalReader(folder))
        self._learn(0)

    def look(self) -> None:
        """Take up what has been written since."""
        first = self._journal.num_records
        self._journal.look()
        self._learn(first)

    def _learn(self, first: int) -> None:
        for number, record in self._journal.records(first):
            if record["kind"] == "iteration":
                self._iterations.append(number)
