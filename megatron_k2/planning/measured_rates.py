"""``selfcheck.json``: what a machine's self-check measured, as one record to write and to read.

The self-check writes it, ``megatron-k2 plan --calibrate`` reads it. A rate that was not measured is
``None``, whatever the reason: a run that was cut off leaves a file that is still true. Keys that
are not named here are kept as they came, in ``other``, so that a step may add its own.
"""

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_k2.errors import UserError
from megatron_k2.files import write_atomically

SCHEMA_VERSION = 1
MAX_BYTES = 16 << 20
"""Of a file that is read: a record has a few kilobytes."""

DeviceKind = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Device:
    """What was measured."""

    name: str
    """As the driver calls it, ``NVIDIA H100 80GB HBM3``; of a CPU its model name."""
    kind: DeviceKind
    memory_bytes: int
    """Of one device; of a CPU the machine's."""
    count: int
    """Devices in the machine."""
    other: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainStep:
    """A training step of a small preset, beside what the planner said of it before."""

    preset: str
    tokens_per_s: float
    model_flops_per_token: float
    """What MFU counts: forward and twice that, nothing recomputed."""
    peak_bytes: int
    predicted_peak_bytes: int
    other: dict[str, Any] = field(default_factory=dict)

    @property
    def model_flops_per_s(self) -> float:
        """Model FLOPs a second."""
        return self.tokens_per_s * self.model_flops_per_token


@dataclass(frozen=True)
class Rates:
    """Rates of one device; ``None`` where not measured."""

    matmul_bf16_flops: float | None = None
    """FLOP/s of a large matrix product, a multiply-add counted as two."""
    matmul_fp32_flops: float | None = None
    copy_bytes_per_s: float | None = None
    """Bytes read and bytes written, together, of a copy within the device's memory."""
    newton_schulz_flops: dict[str, float] = field(default_factory=dict)
    """``<rows>x<cols>`` -> FLOP/s: those that ``newton_schulz_flops`` counts with symmetric
    products formed whole, whichever kernel ran, over the seconds it took."""
    train_step: TrainStep | None = None
    intra_node_bytes_per_s: float | None = None
    """One direction, from one device to another of its node."""
    inter_node_bytes_per_s: float | None = None


@dataclass(frozen=True)
class SelfcheckRecord:
    """One run of the self-check."""

    device: Device
    rates: Rates
    versions: dict[str, Any] = field(default_factory=dict)
    steps: tuple[dict[str, Any], ...] = ()
    """Result of every step that ran, in order."""

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        device, rates, step = self.device, self.rates, self.rates.train_step
        return {
            "schema_version": SCHEMA_VERSION,
            "device": {
                "name": device.name,
                "kind": device.kind,
                "memory_bytes": device.memory_bytes,
                "count": device.count,
                **device.other,
            },
            "versions": self.versions,
            "rates": {
                "matmul_bf16_flops": rates.matmul_bf16_flops,
                "matmul_fp32_flops": rates.matmul_fp32_flops,
                "copy_bytes_per_s": rates.copy_bytes_per_s,
                "newton_schulz_flops": rates.newton_schulz_flops,
                "train_step": None if step is None else _step_to_json(step),
                "link_bytes_per_s": {
                    "intra_node": rates.intra_node_bytes_per_s,
                    "inter_node": rates.inter_node_bytes_per_s,
                },
            },
            "steps": list(self.steps),
        }


def _step_to_json(step: TrainStep) -> dict[str, Any]:
    return {
        "preset": step.preset,
        "tokens_per_s": step.tokens_per_s,
        "model_flops_per_token": step.model_flops_per_token,
        "peak_bytes": step.peak_bytes,
        "predicted_peak_bytes": step.predicted_peak_bytes,
        **step.other,
    }


def write_record(path: Path, record: SelfcheckRecord) -> None:
    """Write the file, whole or not at all.

    Raises:
        ValueError: for a rate that is not finite, which JSON has no word for.
    """
    content = json.dumps(record.to_json(), indent=2, allow_nan=False)
    write_atomically(path, f"{content}\n".encode())


def read_record(path: Path) -> SelfcheckRecord:
    """The record in a file.

    Raises:
        UserError: if there is none, or it is damaged, of another version, or another file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; selfcheck writes it on the machine to measure")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise UserError(f"{path} has {size:,} bytes: not a selfcheck.json, which has kilobytes")
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise UserError(
            f"{path} is not valid JSON: cut off or another file; copy selfcheck.json again"
        ) from None
    if not isinstance(document, dict) or "schema_version" not in document:
        raise UserError(f"{path} has no schema_version: not a file that selfcheck wrote")
    if document["schema_version"] != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema_version {document['schema_version']!r}, {SCHEMA_VERSION} is read; "
            "run the selfcheck of this version"
        )
    return _Reader(path).record(document)


class _Reader:
    """Values out of a document, each of the type and range that it must have."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def record(self, document: dict[str, Any]) -> SelfcheckRecord:
        """All of it."""
        steps = self.value(document, "steps", list, "a list")
        if not all(isinstance(step, dict) for step in steps):
            raise self.wrong("steps", steps, "a list of objects")
        return SelfcheckRecord(
            self.device(self.value(document, "device", dict, "an object")),
            self.rates(self.value(document, "rates", dict, "an object")),
            self.value(document, "versions", dict, "an object"),
            tuple(steps),
        )

    def device(self, of: dict[str, Any]) -> Device:
        """The device, whose kind is one that is known."""
        kind = self.value(of, "device.kind", str, "a string")
        if kind not in get_args(DeviceKind):
            raise self.wrong("device.kind", kind, "cuda or cpu")
        known = "name", "kind", "memory_bytes", "count"
        return Device(
            self.value(of, "device.name", str, "a string"),
            kind,
            self.count(of, "device.memory_bytes"),
            self.count(of, "device.count"),
            {key: value for key, value in of.items() if key not in known},
        )

    def rates(self, of: dict[str, Any]) -> Rates:
        """The rates, each a number above 0 or null."""
        shapes = self.value(of, "rates.newton_schulz_flops", dict, "an object")
        for shape in shapes:
            if not re.fullmatch(r"[1-9][0-9]{0,8}x[1-9][0-9]{0,8}", shape):
                raise self.wrong("rates.newton_schulz_flops", shape, "<rows>x<cols>")
        links = self.value(of, "rates.link_bytes_per_s", dict, "an object")
        step = of.get("train_step")
        where = "rates.newton_schulz_flops."
        return Rates(
            self.rate(of, "rates.matmul_bf16_flops"),
            self.rate(of, "rates.matmul_fp32_flops"),
            self.rate(of, "rates.copy_bytes_per_s"),
            {shape: self.number(shapes, where + shape) for shape in shapes},
            None if step is None else self.train_step(step),
            self.rate(links, "rates.link_bytes_per_s.intra_node"),
            self.rate(links, "rates.link_bytes_per_s.inter_node"),
        )

    def train_step(self, of: Any) -> TrainStep:
        """A step that was measured."""
        if not isinstance(of, dict):
            raise self.wrong("rates.train_step", of, "an object or null")
        known = "preset tokens_per_s model_flops_per_token peak_bytes predicted_peak_bytes".split()
        return TrainStep(
            self.value(of, "rates.train_step.preset", str, "a string"),
            self.number(of, "rates.train_step.tokens_per_s"),
            self.number(of, "rates.train_step.model_flops_per_token"),
            self.count(of, "rates.train_step.peak_bytes"),
            self.count(of, "rates.train_step.predicted_peak_bytes"),
            {key: value for key, value in of.items() if key not in known},
        )

    def value(self, of: dict[str, Any], key: str, kind: type, said: str) -> Any:
        """``of``'s value of the last part of ``key``, of the type ``kind``."""
        found = of.get(key.rpartition(".")[2])
        if not isinstance(found, kind):
            raise self.wrong(key, found, said)
        return found

    def rate(self, of: dict[str, Any], key: str) -> float | None:
        """A number above 0, or ``None``."""
        return None if of.get(key.rpartition(".")[2]) is None else self.number(of, key)

    def number(self, of: dict[str, Any], key: str) -> float:
        """A finite number above 0."""
        found = of.get(key.rpartition(".")[2])
        if isinstance(found, int | float) and not isinstance(found, bool):
            if 0 < found <= sys.float_info.max:
                return float(found)
        raise self.wrong(key, found, "a number above 0")

    def count(self, of: dict[str, Any], key: str) -> int:
        """A whole number above 0."""
        found = self.number(of, key)
        if found != int(found):
            raise self.wrong(key, found, "a whole number")
        return int(found)

    def wrong(self, key: str, found: Any, expected: str) -> UserError:
        """What to raise for a value."""
        shown = f"{found!r:.60}"
        return UserError(
            f"{self.path}: {key} is {shown}, expected {expected}: damaged, or no selfcheck.json"
        )
