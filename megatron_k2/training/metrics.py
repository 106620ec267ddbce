"""One record a step, in ``metrics.jsonl``: what training saw, exact to the last digit.

A run that was killed and resumed has the same lines as one that was not (timings apart): lines past
the checkpoint that was loaded are dropped before the first new one is written.
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_k2.errors import UserError

METRICS_FILE = "metrics.jsonl"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. Maxima are over the global batch, of the weights before the step."""

    iteration: int
    consumed_samples: int
    consumed_tokens: int
    loss: float
    """Mean nats per token of the global batch."""
    learning_rate: float
    grad_norm: float
    """Global, before clipping."""
    is_skipped: bool
    seconds: float
    tokens_per_second: float
    max_logit_per_layer: tuple[float, ...]
    """Largest softmax input of any head, a decoder layer each."""
    num_clipped_heads: int
    """Heads over the threshold in this step, all layers."""
    load_max_over_mean_per_layer: tuple[float, ...]
    """Busiest expert's tokens over the mean, a layer with experts each."""
    adamw_grad_norm: float | None = None
    """Of AdamW's gradients alone, before clipping; none without MuonClip or in a skipped step."""
    schema_version: int = SCHEMA_VERSION

    @property
    def max_logit(self) -> float:
        """Over all layers."""
        return max(self.max_logit_per_layer, default=-math.inf)

    @property
    def load_max_over_mean(self) -> float:
        """Over all layers."""
        return max(self.load_max_over_mean_per_layer, default=1.0)


def read_records(path: Path) -> list[StepRecord]:
    """Every whole line of ``path``; a last line that a kill cut short is left out.

    Raises:
        UserError: if another line is damaged; what follows it must not be lost to a rewrite.
    """
    if not path.exists():
        return []
    records = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(
                f"{path}:{number} is not a record ({error}); restore the file or move it away"
            ) from error
        fields["max_logit_per_layer"] = tuple(fields["max_logit_per_layer"])
        fields["load_max_over_mean_per_layer"] = tuple(fields["load_max_over_mean_per_layer"])
        records.append(StepRecord(**fields))
    return records


class MetricsWriter:
    """Appends records to one file, each on disk before the next step starts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_trimmed = False

    def write(self, record: StepRecord) -> None:
        """Append ``record``; the first call drops what an earlier run wrote past it."""
        if not self._is_trimmed:
            self._drop_from(record.iteration)
            self._is_trimmed = True
        with self._path.open("a") as file:
            _write_line(file, record)
            file.flush()
            os.fsync(file.fileno())

    def _drop_from(self, iteration: int) -> None:
        kept = [r for r in read_records(self._path) if r.iteration < iteration]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("w") as file:
            for record in kept:
                _write_line(file, record)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)


def _write_line(file: object, record: StepRecord) -> None:
    print(json.dumps(asdict(record)), file=file)  # type: ignore[call-overload]
