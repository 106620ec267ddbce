"""Proof on the user's own machine: which tests are run where, and what they said, as one table.

The tests are the checkout's own, the same bodies on GPUs over NCCL (marker ``gpu``) and on CPU over
gloo. What they measured they record as properties (``difference``: the largest one to the oracle,
``bar``: what it must stay under), which pytest writes to its JUnit file.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from megatron_k2.errors import UserError
from megatron_k2.selfcheck.findings import Verdict


@dataclass(frozen=True)
class Check:
    """A row of the table: tests that show one thing."""

    name: str
    tests: tuple[str, ...]
    on_cpu: bool = True
    on_gpu: bool = True
    is_quick: bool = False
    """Under half a minute on two cores."""


CHECKS = (
    Check(
        "logits, gradients = transformers",
        ("model/test_hf_parity.py",),
        is_quick=True,
    ),
    Check("attention, largest logits", ("model/test_attention.py",), is_quick=True),
    Check(
        "routing, experts, recomputation",
        (
            *("model/test_moe.py", "model/test_experts.py", "model/test_recompute.py"),
            *("model/test_norm.py", "model/test_linear_and_mla.py", "model/test_vocabulary.py"),
            *("model/test_stock_spec.py", "model/test_static_context.py"),
        ),
        is_quick=True,
    ),
    Check("an optimizer step by hand", ("optimizer/test_muonclip.py",), is_quick=True),
    Check(
        "optimizer's bytes, and on the host",
        ("optimizer/sharded/test_memory.py", "optimizer/offload/test_optimizer.py"),
        is_quick=True,
    ),
    Check("optimizer's counts", ("optimizer/sharded/test_counts.py",)),
    Check("loss and text = transformers", ("engine/mcore/test_layouts.py",)),
    Check(
        "the engine = transformers",
        ("engine/local/test_model.py", "engine/local/test_core.py"),
        is_quick=True,
    ),
    Check("the engine's batch-invariant mode", ("engine/local/test_invariant.py",)),
    Check(
        "MuonClip against its oracles",
        ("optimizer/qk_clip/test_factors.py",),
        on_gpu=False,
        is_quick=True,
    ),
    Check("an allocation before its first step", ("launch/test_node_check.py",)),
    Check("every layout = one rank", ("parallel/test_layouts.py",)),
    Check("packed = documents alone", ("sft/test_packed_training.py",)),
    Check("adapters = merged weights", ("sft/lora/test_model.py",)),
    Check("adapters at every layout", ("sft/lora/test_layouts.py",)),
    Check(
        "RL's loss, routes replayed",
        ("rl/test_objective.py", "rl/test_logprobs.py", "rl/test_replay.py", "rl/test_phases.py"),
        is_quick=True,
    ),
    Check("RL at every layout = one rank", ("rl/test_learner.py",)),
    Check("bf16 masters, MTP layers", ("parallel/test_bf16_and_mtp.py",)),
    Check("save, load at another layout", ("parallel/test_reshard.py",)),
    Check("killed rank, exact resume", ("training/test_resume.py",)),
    Check("a spike, back to before it", ("training/test_spikes.py",)),
    Check("a phase keeps the optimizer", ("training/test_phase_start.py",)),
    Check("FP8 tiles by Triton", ("fp8/test_triton_tiles.py",), is_quick=True),
    Check(
        "Newton-Schulz by Triton",
        ("optimizer/newton_schulz/test_symmetric.py",),
        is_quick=True,
    ),
    Check("Transformer Engine's modules", ("te",)),
)


@dataclass(frozen=True)
class Outcome:
    """What the tests of a check said."""

    check: Check
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    difference: float | None = None
    """The largest recorded, next to its bar."""
    bar: float | None = None
    note: str = ""
    """Why tests were skipped, or the first failure's first line."""

    @property
    def verdict(self) -> Verdict:
        """pass, FAIL, or skip where nothing ran."""
        if self.failed:
            return "FAIL"
        return "pass" if self.passed else "skip"


def chosen(only: str | None, *, on_gpu: bool, is_quick: bool) -> list[Check]:
    """Checks that exist for the device.

    Args:
        only: part of a name.
        on_gpu: the GPU column, else the CPU's.
        is_quick: those under half a minute only.

    Raises:
        UserError: if nothing is left.
    """
    found = [
        check
        for check in CHECKS
        if (check.on_gpu if on_gpu else check.on_cpu)
        and (check.is_quick or not is_quick)
        and (only is None or only in check.name)
    ]
    if not found:
        raise UserError(
            f"no check is called '{only}'; they are: {', '.join(c.name for c in CHECKS)}"
        )
    return found


def checkout_tests() -> Path:
    """The checkout's tests.

    Raises:
        UserError: if the package was installed without them.
    """
    path = Path(__file__).resolve().parents[2] / "tests"
    if not path.is_dir():
        raise UserError(
            "selfcheck runs the tests of a checkout, and this package was installed without them; "
            "clone the repository and pip install -e '.[data,dev]' there"
        )
    return path


def run_check(check: Check, *, on_gpu: bool, limit: float | None = None) -> Outcome | None:
    """Run a check's tests in a process of their own; nothing is printed.

    Returns:
        What they said, or ``None`` if they were ended after ``limit`` seconds.
    """
    tests = checkout_tests()
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder) / "report.xml", Path(folder) / "log"
        command = [sys.executable, "-m", "pytest", "-q", "--no-showlocals", f"--junitxml={report}"]
        command += ["-m", "gpu" if on_gpu else "not gpu and not slurm"]
        command += [str(tests / name) for name in check.tests]
        with log.open("w") as output:
            process = subprocess.Popen(
                command,
                cwd=tests.parent,
                env={"OMP_NUM_THREADS": "1"} | os.environ,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if ended_at(process, limit) is None:
            return None
        if not report.is_file():
            return Outcome(check, failed=1, note=log.read_text().strip().splitlines()[-1])
        return read_report(check, report.read_text())


def ended_at(process: subprocess.Popen[bytes], limit: float | None) -> int | None:
    """The exit code, or ``None`` where it was ended at its limit with all that it had started."""
    try:
        return process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with what it left behind, if anything
        process.wait()


def read_report(check: Check, xml: str) -> Outcome:
    """What a JUnit report says."""
    cases = list(ElementTree.fromstring(xml).iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or _error(case) is not None]
    left_out = [case for case in cases if case.find("skipped") is not None]
    measured = [
        (float(value), float(properties.get("bar", "nan")))
        for case in cases
        if (value := (properties := _properties(case)).get("difference")) is not None
    ]
    difference, bar = max(measured, default=(None, None), key=lambda pair: pair[0] or 0.0)
    note = ""
    if bad:
        found = bad[0].find("failure")
        found = _error(bad[0]) if found is None else found
        assert found is not None
        note = f"{bad[0].get('name')}: {(found.get('message') or '').splitlines()[0]}"
    elif left_out:
        skipped = left_out[0].find("skipped")
        assert skipped is not None
        note = (skipped.get("message") or "").splitlines()[0]
    return Outcome(
        check,
        passed=len(cases) - len(bad) - len(left_out),
        failed=len(bad),
        skipped=len(left_out),
        seconds=sum(float(case.get("time", 0)) for case in cases),
        difference=difference,
        bar=bar,
        note=note,
    )


def _error(case: ElementTree.Element) -> ElementTree.Element | None:
    return case.find("error")


def _properties(case: ElementTree.Element) -> dict[str, str]:
    return {str(p.get("name")): str(p.get("value")) for p in case.iter("property")}
