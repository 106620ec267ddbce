"""The table of ``megatron-k2 selfcheck``: what is chosen, how a report is read, one real run."""

import re

import pytest

from megatron_k2.cli.main import main
from megatron_k2.errors import UserError
from megatron_k2.selfcheck import checkout_tests as checkout
from megatron_k2.selfcheck.checkout_tests import CHECKS, checkout_tests, chosen, read_report

REPORT = """<testsuites><testsuite>
<testcase name="a" time="1.5"><properties><property name="difference" value="3e-7"/>
<property name="bar" value="1e-6"/></properties></testcase>
<testcase name="b" time="0.5"><properties><property name="difference" value="2e-8"/>
<property name="bar" value="1e-5"/></properties></testcase>
<testcase name="c" time="1"><skipped message="2 GPUs needed, 0 here"/></testcase>
{more}</testsuite></testsuites>"""
FAILED = (
    '<testcase name="d" time="1"><failure message="off by 3&#10;more">trace</failure></testcase>'
)


def test_a_report_is_counted_and_its_largest_difference_kept_with_its_own_bar():
    outcome = read_report(CHECKS[0], REPORT.format(more=""))
    assert (outcome.passed, outcome.failed, outcome.skipped) == (2, 0, 1)
    assert (outcome.difference, outcome.bar, outcome.seconds) == (3e-7, 1e-6, 3.0)
    assert outcome.verdict == "pass"
    assert outcome.note == "2 GPUs needed, 0 here"


def test_one_failure_makes_the_check_fail_and_is_named():
    outcome = read_report(CHECKS[0], REPORT.format(more=FAILED))
    assert outcome.verdict == "FAIL"
    assert outcome.note == "d: off by 3"


def test_a_check_of_which_nothing_ran_is_not_a_pass():
    only_skipped = (
        '<testsuite><testcase name="c"><skipped message="no GPU"/></testcase></testsuite>'
    )
    assert read_report(CHECKS[0], only_skipped).verdict == "skip"


def test_every_check_names_tests_that_exist_and_every_gpu_test_is_in_one():
    named = [checkout_tests() / name for check in CHECKS for name in check.tests]
    assert all(path.exists() for path in named)
    marker = re.compile(r"\b(BACKENDS|DEVICES|pytest\.mark\.gpu)\b")  # not CUDA_VISIBLE_DEVICES
    marked = [
        path for path in checkout_tests().rglob("test_*.py") if marker.search(path.read_text())
    ]
    left_out = [
        path.name for path in marked if not any(path == n or n in path.parents for n in named)
    ]
    assert left_out == ["test_checkout_tests.py"]  # it names the marker


def test_columns_differ_and_an_unknown_name_lists_the_known():
    assert {c.name for c in chosen(None, on_gpu=True, is_quick=False)} < {c.name for c in CHECKS}
    with pytest.raises(UserError, match="no check is called 'zz'; they are: logits"):
        chosen("zz", on_gpu=False, is_quick=True)


@pytest.mark.slow
def test_the_cpu_column_runs_the_tests_and_prints_what_they_measured(capsys):
    argv = ["selfcheck", "--tests", "--device", "cpu", "--only", "MuonClip"]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("MuonClip"))
    assert " pass " in row
    assert float(row.split()[-2]) <= float(row.split()[-1])


def test_without_a_checkout_the_way_out_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(checkout, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    with pytest.raises(UserError, match="clone the repository"):
        checkout_tests()
