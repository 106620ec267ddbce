"""The chat page in headless Chromium: it streams, shows calls and probabilities, runs no markup."""

import shutil

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

from tests.engine.server.served import served, tokenizer_in  # noqa: E402
from tests.engine.server.test_server import CALL, says  # noqa: E402

MARKUP = "<img src=x onerror=\"document.title='taken'\">"


def test_a_turn_with_a_call_and_a_turn_of_markup(tmp_path):
    tokenizer = tokenizer_in(tmp_path)
    with served(says(tokenizer, MARKUP + CALL), tokenizer) as (url, _):
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(
                executable_path=CHROMIUM, args=["--no-sandbox"], headless=True
            )
            page = browser.new_page(viewport={"width": 760, "height": 560})
            errors = []
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(url)
            page.fill("#text", f"What is the weather in Paris? {MARKUP}")
            page.check("#shades")
            page.keyboard.press("Tab")
            page.click("#send")
            page.wait_for_selector(".call")
            page.wait_for_function("!document.getElementById('send').disabled")
            found = {
                "model": page.inner_text("#model"),
                "call": page.inner_text(".call"),
                "answer": page.inner_text(".assistant"),
                "asked": page.inner_text(".user"),
                "scored": page.locator("span[data-p]").count(),
                "images": page.locator("img").count(),
                "title": page.title(),
            }
            page.screenshot(path=tmp_path / "page.png")
            browser.close()
    assert errors == []
    assert found["model"] == "tiny"
    assert found["call"] == 'functions.get_weather:0({"city": "Paris"})'
    assert MARKUP in found["answer"]
    assert MARKUP in found["asked"]
    assert found["scored"] > 3
    assert (found["images"], found["title"]) == (0, "megatron_k2")
