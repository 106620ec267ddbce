"""The page of trajectories in headless Chromium: it filters, draws, and runs no record's markup."""

import shutil

import pytest

from megatron_k2.errors import UserError
from megatron_k2.run.report.page import trajectories_page

MARKUP = "</script><img src=x onerror=\"document.title='taken'\"><!--"


def row(number, outcome="right", **more):
    reward = {"right": 1.0, "wrong": 0.0, "unknown": None}[outcome]
    messages = [
        {"role": "user", "content": f"Question {number}: {MARKUP}"},
        {
            "role": "assistant",
            "content": MARKUP,
            "tool_calls": [{"id": "a", "function": {"name": "add", "arguments": '{"a": 1}'}}],
        },
        {"role": "tool", "name": "add", "content": "2"},
        {"role": "assistant", "content": f"The answer is {number}."},
    ]
    base = {
        "task_id": f"t{number}",
        "domain": "mathematics" if number % 2 else "logic",
        "end": "over",
    }
    return {
        **base, "messages": messages, "outcome": outcome, "reward": reward,
        "evidence": f"compared {number}", "reason": "", "sampled": [1], **more,
    }  # fmt: skip


def rows():
    outcomes = ("right", "wrong", "unknown")
    return [row(n, outcomes[n % 3], iteration=n // 4) for n in range(12)]


def test_no_text_ends_its_place():
    page = trajectories_page("x " + MARKUP, rows())
    assert "<img" not in page
    assert page.count("</script>") == 2
    assert '"sampled"' not in page


def test_a_row_without_a_field_is_refused():
    with pytest.raises(UserError, match="has no 'reward'"):
        trajectories_page("x", [{k: v for k, v in row(1).items() if k != "reward"}])


def test_points_that_are_no_numbers_are_left_out():
    page = trajectories_page("x", [], {"loss": [(0, 1.0), (1, float("nan"))], "no": []})
    assert "NaN" not in page.split('type="application/json">')[1].split("</script>")[0]
    assert '"name": "no"' not in page


def test_in_a_browser(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    curves = {"reward": [(i, i * 0.1) for i in range(10)], "mismatch": [(0, 0.1)]}
    path = tmp_path / "page.html"
    path.write_text(trajectories_page("twelve", rows(), curves), "utf-8")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 700})
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        page.goto(path.as_uri())
        assert page.locator("#list button").count() == 12
        assert "12 trajectories, 4 without a reward" in page.inner_text("#summary")
        assert page.locator("#curves svg path").count() == 2
        page.select_option("#outcome", "wrong")
        page.select_option("#iteration", "1")
        assert page.locator("#list button").count() == 2
        page.screenshot(path=tmp_path / "page.png")
        page.select_option("#outcome", "")
        page.select_option("#iteration", "")
        page.fill("#search", "question 7")
        page.wait_for_function("document.querySelectorAll('#list button').length === 1")
        shown = page.inner_text("#shown")
        images, title = page.locator("img").count(), page.title()
        browser.close()
    assert errors == []
    assert "The answer is 7." in shown
    assert MARKUP in shown
    assert "compared 7" in shown
    assert 'add({"a": 1})' in shown
    assert (images, title) == (0, "twelve")
