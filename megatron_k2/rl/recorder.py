"""What is kept and said of each iteration, on every rank alike: records, curves, alarms, a line.

The last rank writes, as in pretraining; all of them hold the same history, and so raise the same
alarms.
"""

import dataclasses
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

from megatron_k2.chat.control import ChatTokenizer
from megatron_k2.data.tokenizer import load_tokenizer
from megatron_k2.host.torchrun import end
from megatron_k2.rl.history import History, Row
from megatron_k2.rl.learnt import metrics
from megatron_k2.rl.loop import Iteration
from megatron_k2.rl.rails import Alarm, alarms, rails_from
from megatron_k2.rl.report import page_rows, write_report
from megatron_k2.rl.side import FOLDER
from megatron_k2.run.console import duration
from megatron_k2.run.metrics import METRICS_FILE, JsonLines, MetricsWriter, read_records
from megatron_k2.training.spike_watch import EXIT_CODE

UPDATES = "updates.jsonl"
"""A line a mini-batch; what any training sees of a step is in ``metrics.jsonl`` of the run."""
REPORT_EVERY = 10
"""Iterations between two pictures, the last always; ours."""


class Recorder:
    """Takes each iteration when it is done.

    Args:
        args: Megatron's and ours.
        number: of the last mini-batch that a resumed run has behind it.
        iteration: that it goes on with.
        terminal: of the run, on the last rank.
    """

    def __init__(
        self, args: Namespace, number: int, iteration: int, terminal: TextIO | None
    ) -> None:
        self._args, self._terminal = args, terminal
        self._is_last = args.rank == args.world_size - 1
        self._rails = rails_from(args.rail)
        self._folder = Path(args.save) / FOLDER if args.save else None
        self._files = _Files(self._folder, number) if self._folder and self._is_last else None
        self._history = History(self._folder, iteration, writes=self._is_last)
        self._seconds: float | None = None
        self._answers: dict[int, list[Mapping[str, Any]]] = {}
        self._tokenizer: ChatTokenizer | None = None

    def show(self, found: Iteration) -> None:
        """Keep it, say it, and stop the run where an alarm asks for that.

        Raises:
            SystemExit: with ``EXIT_CODE``, on every rank.
        """
        row = Row(found.number, found.version, _metrics(found), found.collected.position)
        before = self._history.before
        self._history.add(row)
        if self._is_last:
            if self._files is not None:
                self._files.write(found)
            _draw(row)
            self._say(self._line(row))
            self._keep_answers(found)
            if (found.number + 1) % REPORT_EVERY == 0 or found.number + 1 == self._args.iterations:
                self._report()
        self._meet(alarms(found.number, row.metrics, before, self._rails))

    def _line(self, row: Row) -> str:
        values, last = row.metrics, self._args.iterations
        seconds = sum(value for name, value in values.items() if name.startswith("seconds/"))
        mean = seconds if self._seconds is None else 0.8 * self._seconds + 0.2 * seconds
        self._seconds = mean
        parts = [f"iteration {row.iteration + 1:{len(str(last))}}/{last}"]
        for title, beginning in (("reward", "rl/reward/"), ("held out", "eval/")):
            shown = _shown(values, beginning)
            parts += [f"{title} {shown}"] if shown else []
        for name in ("mismatch", "kl"):
            if (value := values.get(f"learn/{name}")) is not None:
                parts.append(f"{name} {value:.1e}")
        phases = ("collect", "old", "step", "sync")
        parts.append(
            ", ".join(f"{name} {values.get(f'seconds/{name}', 0):.1f}" for name in phases) + " s"
        )
        parts.append(f"eta {duration(mean * (last - row.iteration - 1))}")
        return " | ".join(parts)

    def _keep_answers(self, found: Iteration) -> None:
        """For the page: of the first iteration that was seen, and of the last."""
        if self._args.chat_tokenizer is None:
            return
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._args.chat_tokenizer)
        rows = page_rows(found.collected.groups, found.number, self._tokenizer.decode)
        first = min(self._answers, default=found.number)
        self._answers = {first: self._answers.get(first, rows), found.number: rows}

    def _report(self) -> None:
        if self._folder is None:
            return
        rows = [row for number in sorted(self._answers) for row in self._answers[number]]
        title = f"{self._folder.parent.name}: {len(self._history.rows)} iterations"
        write_report(self._folder, self._history.rows, rows, title)

    def _meet(self, found: Sequence[Alarm]) -> None:
        if self._args.on_alarm == "off":
            return
        must_stop = False
        for alarm in found:
            stops = alarm.rail.action == "stop" and self._args.on_alarm == "stop"
            must_stop |= stops
            self._say(f"{alarm}; {'stopped' if stops else 'going on'}")
        if must_stop:
            if self._is_last:
                self._report()
            self._say("nothing was saved since the last checkpoint (--on-alarm stop)")
            dist.barrier()
            end(EXIT_CODE)

    def _say(self, text: str) -> None:
        if self._is_last:
            print(text, file=self._terminal, flush=True)


class _Files:
    """Records of steps, a line a mini-batch, on disk before the next iteration begins.

    Args:
        folder: of the run's RL.
        number: of the last mini-batch that a resumed run has behind it.
    """

    def __init__(self, folder: Path, number: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._steps = MetricsWriter(folder.parent)
        self._lines = JsonLines(folder / UPDATES)
        records = read_records(folder.parent / METRICS_FILE)
        before = [record for record in records if record.iteration <= number]
        self._num_tokens = before[-1].consumed_tokens if before else 0

    def write(self, found: Iteration) -> None:
        """What any training keeps of a step, and what only this one has."""
        for update in found.learnt.updates:
            fields = dataclasses.asdict(update)
            measured = fields.pop("measured") or {}
            if update.measured is not None:
                self._num_tokens += update.num_tokens
                step = update.measured.step
                self._steps.write(dataclasses.replace(step, consumed_tokens=self._num_tokens))
                del measured["step"]
            line = {"iteration": fields.pop("number"), "round": found.number}
            compared = {"mismatch": dataclasses.asdict(found.learnt.mismatch)}
            self._lines.append(line | fields | measured | compared)


def _metrics(found: Iteration) -> dict[str, float]:
    seconds = {
        "collect": found.collect_seconds,
        "old": found.learnt.old_seconds,
        "step": found.learnt.step_seconds,
        "sync": 0.0 if found.sync is None else found.sync.seconds,
    }
    return {
        **found.collected.metrics,
        **metrics(found.learnt),
        **{f"seconds/{name}": value for name, value in seconds.items()},
    }


def _shown(values: Mapping[str, float], beginning: str) -> str:
    names = [n for n in sorted(values) if n.startswith(beginning) and "_" not in n.split("/")[-1]]
    return " ".join(f"{name.removeprefix(beginning)} {values[name]:.2f}" for name in names)


def _draw(row: Row) -> None:
    """Curves, for whoever watches."""
    from megatron.training import get_tensorboard_writer, get_wandb_writer

    if (tensorboard := get_tensorboard_writer()) is not None:
        for name, value in row.metrics.items():
            tensorboard.add_scalar(name, value, row.iteration)
    if (wandb := get_wandb_writer()) is not None:
        wandb.log(dict(row.metrics), row.iteration)
