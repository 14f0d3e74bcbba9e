"""Actions and checks on the application's page in a real browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

OpenPage = Callable[..., "Page"]  # type of the fixture `open_page`
PHONE = {"viewport": {"width": 390, "height": 844}}
HOSTILE = "<img src=x onerror=window.hacked=1>${window.hacked=2}{{constructor}}"  # each part sets window.hacked if run
AXE = Path(__file__).parent / "vendor" / "axe-core-4.14.1.min.js"
IGNORED_RULES = {"label-content-name-mismatch"}  # Gradio's image input is a button whose name differs from its text


def run_comparison(page: Page) -> None:
    """Click Run and wait until every model has ended."""
    grid = page.locator("#candidates .grid-columns")
    previous = grid.get_attribute("data-run")
    page.get_by_role("button", name="Run", exact=True).click()
    page.wait_for_function(
        "previous => (document.querySelector('#candidates .grid-columns').dataset.run ?? null) !== previous",
        arg=previous,
    )
    page.wait_for_selector("#candidates .model-column")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.model-column')].every(column =>"
        " ['done', 'failed', 'cancelled'].includes(column.dataset.status))"
    )
    page.wait_for_selector("#run:not([disabled])")


def set_weight(page: Page, name: str, value: float) -> None:
    """Move the slider of a reward."""
    page.locator(f"#weight-{name} input[type=range]").evaluate(
        "(node, value) => { node.value = value; node.dispatchEvent(new Event('input', {bubbles: true})); }", value
    )


def violations(page: Page) -> list[str]:
    """Return the accessibility violations that axe-core finds in the page."""
    page.evaluate(AXE.read_text(encoding="utf-8"))
    result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{violation['id']}: {node['html'][:160]} {node['failureSummary']}"
        for violation in result["violations"]
        if violation["id"] not in IGNORED_RULES
        for node in violation["nodes"]
    ]
