"""The steps' machinery: limits, crashes, the record after each; a step and the picture for real."""

import json
import sys
import textwrap

import pytest

from megatron_k2.cli.main import main
from megatron_k2.errors import UserError
from megatron_k2.planning.measured_rates import Device, read_record
from megatron_k2.selfcheck import steps as steps_module
from megatron_k2.selfcheck.findings import Figure, Findings, judged
from megatron_k2.selfcheck.steps import STEPS, Step, chosen_steps, keep, run_steps

DEVICE = Device("a device", "cpu", 1 << 30, 1)
BODIES = {
    "hangs": "import time; time.sleep(600)",
    "dies": "import os; print('last words'); os._exit(9)",
    "raises": "raise ValueError('no such thing\\nmore')",
    "measures": "from megatron_k2.selfcheck.findings import *\n"
    "return judged('seen', [Figure('x', 0.5, bar=1.0)], {'copy_bytes_per_s': 2.0})",
}


@pytest.fixture
def bodies(tmp_path, monkeypatch):
    """Modules beside the package's own, found through its path."""
    for name, body in BODIES.items():
        code = "def measure(device, workload):\n" + textwrap.indent(body, "    ")
        code = code.replace("import *", "import Figure, judged")
        (tmp_path / f"{name}.py").write_text(code)
    starter = tmp_path / "sitecustomize.py"
    starter.write_text(
        f"import megatron_k2.selfcheck as room\nroom.__path__.append({str(tmp_path)!r})\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_a_step_that_hangs_dies_or_raises_takes_nothing_with_it(bodies):
    chosen = [Step(name, name, 6 if name == "hangs" else 60) for name in BODIES]
    found = {r.step.name: r.findings for r in run_steps(chosen, "cuda", "small", 100)}
    assert {name: f.verdict for name, f in found.items()} == {
        "hangs": "time",
        "dies": "FAIL",
        "raises": "FAIL",
        "measures": "pass",
    }
    assert found["dies"].note == "ended with 9: last words"
    assert found["raises"].note == "ValueError: no such thing"
    assert found["measures"].figures == (Figure("x", 0.5, bar=1.0),)


def test_what_the_time_of_all_does_not_reach_is_said_to_be_missing():
    (result,) = run_steps([Step("late", "machine", 60)], "cpu", "small", 1)
    assert result.findings.verdict == "time"
    assert "were used up" in result.findings.note


def test_a_figure_over_its_bar_or_not_a_number_fails_the_step():
    assert judged("", [Figure("x", 2.0, bar=1.0)]).verdict == "FAIL"
    assert judged("", [Figure("x", float("nan"), bar=1.0)]).verdict == "FAIL"
    assert judged("", [Figure("x", 1.0, bar=1.0), Figure("y", 7.0)]).verdict == "pass"


def test_the_record_is_whole_after_every_step_and_holds_the_rates(tmp_path):
    path = tmp_path / "selfcheck.json"
    write = keep(path, DEVICE, {"torch": "2.11"})
    step = {
        "preset": "k2-mini",
        "tokens_per_s": 3.0,
        "model_flops_per_token": 2.0,
        "peak_bytes": 5,
        "predicted_peak_bytes": 4,
        "planned_tokens_per_s": 6.0,
    }
    results = [
        steps_module.StepResult(STEPS[0], Findings("pass", "a"), 1.0),
        steps_module.StepResult(STEPS[5], Findings("pass", "b", (), {"train_step": step}), 2.0),
    ]
    write(results[:1])
    assert read_record(path).rates.train_step is None
    write(results)
    found = read_record(path)
    assert found.rates.train_step.tokens_per_s == 3.0
    assert found.rates.train_step.other == {"planned_tokens_per_s": 6.0}
    assert [s["name"] for s in found.steps] == [STEPS[0].name, STEPS[5].name]


def test_every_steps_module_exists_and_only_known_names_are_chosen():
    for step in STEPS:
        if step.module is not None:
            __import__(f"megatron_k2.selfcheck.{step.module}")
            assert callable(sys.modules[f"megatron_k2.selfcheck.{step.module}"].measure)
    assert [s.name for s in chosen_steps("ceilings", is_quick=True)] == ["Triton kernels, ceilings"]
    with pytest.raises(UserError, match="no such step; they are: 'this machine'"):
        chosen_steps("nothing", is_quick=False)


def test_a_step_runs_is_recorded_read_by_the_planner_and_drawn(tmp_path, capsys):
    path = tmp_path / "selfcheck.json"
    argv = ["selfcheck", "--device", "cpu", "--only", "ceilings", "--record", str(path)]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "pass  Triton kernels, ceilings" in said
    assert "TFLOP/s" in said
    assert json.loads(path.read_text())["rates"]["copy_bytes_per_s"] > 0
    assert main(["selfcheck", "--draw", str(path)]) == 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert main(["selfcheck", "--draw", str(tmp_path / "none.json")]) == 2


@pytest.mark.slow
def test_the_optimizer_on_two_sides_agrees_on_a_cpu(tmp_path):
    """The model's two sides run from the archive: ``make test-bundle``."""
    path = tmp_path / "selfcheck.json"
    argv = ["selfcheck", "--device", "cpu", "--only", "MuonClip", "--record", str(path)]
    assert main(argv) == 0
    (step,) = read_record(path).steps
    assert step["verdict"] == "pass"
    assert all(f["value"] <= f["bar"] for f in step["figures"])
