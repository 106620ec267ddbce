"""One record a step, in ``metrics.jsonl``: what training saw, exact to the last digit.

A run that was killed and resumed has the same lines as one that was not (timings apart): lines past
the checkpoint that was loaded are dropped before the first new one is written.
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.files import write_atomically

METRICS_FILE = "metrics.jsonl"
MAX_LOGITS_FILE = "max_logits.jsonl"
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
    """Norm of all gradients of the global batch, before clipping."""
    is_skipped: bool
    seconds: float
    tokens_per_second: float
    max_logit_per_layer: tuple[float, ...]
    """Largest softmax input of any head, a decoder layer each."""
    num_clipped_heads: int
    """Heads over the threshold in this step, all layers."""
    num_nonfinite_heads: int
    """Heads whose maximum was infinite or NaN: counted, not clipped."""
    smallest_clip_factor: float
    """Smallest γ = τ / S_max of the step, 1 if nothing was clipped."""
    load_max_over_mean_per_layer: tuple[float, ...]
    """Busiest expert's tokens over the mean, a layer with experts each."""
    adamw_grad_norm: float | None = None
    """Norm of AdamW's gradients before clipping; none without MuonClip or in a skipped step."""
    update_rms: dict[str, float] | None = None
    """Root mean square of what the learning rate multiplied, a group of ``step_statistics`` each;
    this and the seconds only with ``--log-muon-steps``."""
    exchange_seconds: float | None = None
    """Time of Muon's exchange that computation did not hide, on the slowest rank."""
    newton_schulz_seconds: float | None = None
    """Time of the Newton-Schulz iterations, on the slowest rank."""
    schema_version: int = SCHEMA_VERSION

    @property
    def max_logit(self) -> float:
        """Largest softmax input of any head in any layer; -inf if none was recorded."""
        return max(self.max_logit_per_layer, default=-math.inf)

    @property
    def load_max_over_mean(self) -> float:
        """Busiest expert's tokens over the mean, of the layer where it is highest."""
        return max(self.load_max_over_mean_per_layer, default=1.0)


def read_records(path: Path) -> list[StepRecord]:
    """Every whole line of ``path``; a last line that a kill cut short is left out.

    Raises:
        UserError: if another line is damaged; what follows it must not be lost to a rewrite.
    """
    records = []
    for fields in _read_lines(path):
        fields["max_logit_per_layer"] = tuple(fields["max_logit_per_layer"])
        fields["load_max_over_mean_per_layer"] = tuple(fields["load_max_over_mean_per_layer"])
        records.append(StepRecord(**fields))
    return records


def read_max_logits(path: Path) -> list[tuple[int, list[list[float]]]]:
    """(iteration, largest logit of each [layer][head]), a log interval each."""
    return [(fields["iteration"], fields["max_logits"]) for fields in _read_lines(path)]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    found = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(
                f"{path}:{number} is not a record ({error}); restore the file or move it away"
            ) from error
    return found


class MetricsWriter:
    """Appends records to a run's files, each on disk before the next step is shown."""

    def __init__(self, directory: Path) -> None:
        self._steps = JsonLines(directory / METRICS_FILE)
        self._heads = JsonLines(directory / MAX_LOGITS_FILE)

    def write(self, record: StepRecord) -> None:
        """Append ``record``; the first call drops what an earlier run wrote past it."""
        self._steps.append(asdict(record))

    def write_max_logits(self, iteration: int, max_logits: list[list[float]]) -> None:
        """Append every head's largest logit, [layer][head], to five digits."""
        rounded = [[float(f"{value:.5g}") for value in row] for row in max_logits]
        self._heads.append({"iteration": iteration, "max_logits": rounded})


class JsonLines:
    """A file of objects with an ``iteration``, in order, without those past a resume."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_trimmed = False

    def append(self, fields: dict[str, Any]) -> None:
        """One more line, on disk; the first drops what an earlier run wrote from there on."""
        if not self._is_trimmed:
            self._drop_from(fields["iteration"])
            self._is_trimmed = True
        with self._path.open("a") as file:
            file.write(json.dumps(fields) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _drop_from(self, iteration: int) -> None:
        kept = [fields for fields in _read_lines(self._path) if fields["iteration"] < iteration]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(fields) + "\n" for fields in kept)
        write_atomically(self._path, text.encode())
