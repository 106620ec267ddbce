"""The steps of the self-check, in order, each in a process of its own with its own time limit.

A step that hangs, crashes or is cut off takes nothing with it: its row says so, the next one runs,
and the record on disk is whole after every step.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.planning.measured_rates import (
    Device,
    Rates,
    SelfcheckRecord,
    TrainStep,
    write_record,
)
from megatron_k2.selfcheck.checkout_tests import Check, ended_at, run_check
from megatron_k2.selfcheck.findings import Findings

TOTAL_SECONDS = {"cuda": 480, "cpu": 960}
PATIENCE = {"cuda": 1, "cpu": 2}
"""A CPU is given so many times a step's seconds: it may be a busy one."""
ENDING_SECONDS = 5


@dataclass(frozen=True)
class Step:
    """One row: a module of this package that measures, or tests of the checkout."""

    name: str
    module: str | None
    seconds: int
    """It is ended after so many."""
    check: Check | None = None
    is_quick: bool = False


STEPS = (
    Step("this machine", "machine", 60, is_quick=True),
    Step("the model against the CPU", "model_parity", 120, is_quick=True),
    Step("MuonClip against the CPU", "muonclip_step", 120),
    Step("Triton kernels, ceilings", "triton_kernels", 100, is_quick=True),
    Step("Newton-Schulz beside others", "newton_schulz_speed", 100, is_quick=True),
    Step("a training step, planned", "training_step", 120),
    Step("text from a checkpoint", "generation", 150),
    Step("several ranks = one", None, 150, Check("several ranks", ("parallel/test_layouts.py",))),
    Step("Transformer Engine", None, 200, Check("Transformer Engine", ("te",))),
)


@dataclass(frozen=True)
class StepResult:
    """A step's row."""

    step: Step
    findings: Findings
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """For the record."""
        return {"name": self.step.name, "seconds": self.seconds, **self.findings.to_json()}


def chosen_steps(only: str | None, *, is_quick: bool) -> list[Step]:
    """Steps whose name has ``only`` in it.

    Raises:
        UserError: if there is none.
    """
    found = [
        step
        for step in STEPS
        if (only is None or only in step.name) and (step.is_quick or not is_quick)
    ]
    if not found:
        names = ", ".join(f"'{step.name}'" for step in STEPS)
        raise UserError(f"--only '{only}': no such step; they are: {names}")
    return found


def run_steps(
    steps: list[Step], device: str, workload: str, total_seconds: float | None = None
) -> Iterator[StepResult]:
    """Each step's result as soon as it is there."""
    total_seconds = total_seconds or TOTAL_SECONDS[device]
    deadline = time.monotonic() + total_seconds
    for step in steps:
        start = time.monotonic()
        left = min(PATIENCE[device] * step.seconds, deadline - start)
        if left < ENDING_SECONDS:
            findings = Findings("time", f"the {total_seconds:.0f} s of all steps were used up")
        elif step.check is not None:
            findings = _run_tests(step.check, device, left)
        else:
            findings = _run_module(str(step.module), device, workload, left)
        yield StepResult(step, findings, time.monotonic() - start)


def _run_module(module: str, device: str, workload: str, limit: float) -> Findings:
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "findings.json", Path(folder) / "log"
        command = [sys.executable, "-W", "ignore", "-m", "megatron_k2.selfcheck.body"]
        command += [module, device, workload, str(out)]
        with log.open("w") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        code = ended_at(process, limit)
        if code is None:
            return Findings("time", f"ended after {limit:.0f} s")
        if not out.is_file():
            said = log.read_text(errors="replace").strip().splitlines() or ["nothing was printed"]
            return Findings("FAIL", f"ended with {code}: {said[-1]}"[:300])
        return Findings.from_json(json.loads(out.read_text()))


def _run_tests(check: Check, device: str, limit: float) -> Findings:
    if (reason := _why_not(check, device)) is not None:
        return Findings("skip", reason)
    outcome = run_check(check, on_gpu=device == "cuda", limit=limit)
    if outcome is None:
        return Findings("time", f"ended after {limit:.0f} s")
    counts = f"{outcome.passed} passed, {outcome.failed} failed, {outcome.skipped} skipped"
    note = f"{counts}; {outcome.note}" if outcome.note else counts
    return Findings(outcome.verdict, note)


def _why_not(check: Check, device: str) -> str | None:
    if "te" in check.tests:
        if importlib.util.find_spec("transformer_engine") is None:
            return "Transformer Engine is not installed; pip install 'megatron-k2[te]'"
        return None
    if device == "cuda":
        import torch

        if (count := torch.cuda.device_count()) < 2:
            return f"{count} GPU here, two are needed"
    return None


def record_of(
    device: Device, versions: dict[str, Any], results: list[StepResult]
) -> SelfcheckRecord:
    """What was measured so far."""
    measured: dict[str, Any] = {}
    for result in results:
        measured.update(result.findings.rates)
    step = measured.pop("train_step", None)
    if step is not None:
        known = {field.name for field in fields(TrainStep)} - {"other"}
        other = {key: value for key, value in step.items() if key not in known}
        step = TrainStep(**{key: step[key] for key in known}, other=other)
    rates = Rates(train_step=step, **measured)
    return SelfcheckRecord(device, rates, versions, tuple(r.to_json() for r in results))


def keep(
    path: Path, device: Device, versions: dict[str, Any]
) -> Callable[[list[StepResult]], None]:
    """Writes the record of the results so far to ``path``, whole or not at all."""

    def write(results: list[StepResult]) -> None:
        write_record(path, record_of(device, versions, results))

    return write
