"""The click path of docs/walkthrough.md with the real app, the real trainer and a second branch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from docs.capture import answer_photos, app
from docs.walkthrough import BRANCH, FUNCTION, SIZE, walk
from training.runs.run import RunStore

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]
STEPS = 3
TEXT = Path(__file__).resolve().parents[2] / "docs" / "walkthrough.md"


def test_walkthrough_works_from_the_example_to_the_usage_of_a_branch(browser: Browser, tmp_path: Path) -> None:
    context = browser.new_context(viewport=SIZE)  # type: ignore[arg-type]
    page = context.new_page()
    page.set_default_timeout(120_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    steps: list[str] = []

    def visit(name: str) -> None:
        steps.append(name)
        assert f"images/walkthrough/{name}.webp" in TEXT.read_text(encoding="utf-8"), "each step has its picture"
        if name == "weights":
            assert float(page.locator(".card-total").first.inner_text()) > 0
            assert page.locator(".grid-label:visible").inner_text() == "Example"
        elif name == "save":
            assert FUNCTION in page.locator("#saved input").input_value()
        elif name == "retrain":
            run = RunStore(tmp_path / "runs").list()[0]
            assert [row["step"] for row in run.metrics()] == [1, 2, 3] and run.status().step == STEPS
            assert page.locator(".curve-legend .line-reward").count() == 1
            assert page.locator(".probe-thumbnails li").count() == len(run.probes())
            assert page.locator(".run-table tbody tr").count() == 5
            result = run.result() or {}
            assert f"on {result['held_out']} held-out photos" in page.locator(".run-verdict").inner_text()
        elif name == "tuned":
            assert page.locator(".model-column[data-model^=run-] .card[data-status=ready]").count() > 0
        elif name == "usage":
            text = page.locator("#dashboard").inner_text()
            assert BRANCH in text and "main" in text

    with app(tmp_path, BRANCH) as preview, app(tmp_path, "main") as address:
        answer_photos(preview, ("coffee.jpg",))
        walk(page, address, preview, STEPS, visit)
    context.close()
    assert errors == []
    assert steps[0] == "open" and steps[-1] == "usage"
