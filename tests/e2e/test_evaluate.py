"""Tests of the Evaluate tab in a real browser."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.browser import PHONE, OpenPage, violations

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
ROWS = ".eval-table tbody tr"
SET_SLIDER = "(node, value) => { node.value = value; node.dispatchEvent(new Event('input', {bubbles: true})); }"


def open_tab(page: Page) -> None:
    page.get_by_role("tab", name="Evaluate").click()
    page.wait_for_selector("#eval-start")
    page.wait_for_function("document.querySelector('#eval-estimate').textContent.includes('photos')")


def choose_models(page: Page, *titles: str) -> None:
    """Choose models in place of the first ones."""
    page.locator("#eval-models button.token-remove, #eval-models .token-remove").first.wait_for()
    while page.locator("#eval-models .token").count():
        page.locator("#eval-models .token .token-remove").first.click()
    for title in titles:
        page.locator("#eval-models input").fill(title)
        page.get_by_role("option", name=title, exact=True).click()
    page.locator("#eval-models input").press("Escape")


def table(page: Page) -> str:
    return page.locator(".eval-table tbody").inner_text()


def test_an_evaluation_from_the_form_to_the_playground(open_page: OpenPage) -> None:
    page = open_page()
    open_tab(page)
    assert page.locator("#evaluation .eval-intro").is_visible()
    choose_models(page, "Fake one", "Fake two", "Fake hostile")
    page.wait_for_function("document.querySelector('#eval-estimate').textContent.includes('3 models')")
    page.get_by_label("At most").fill("3")
    page.locator("#eval-start").click()
    page.wait_for_selector("#evaluation .eval[data-state=done]")
    assert page.locator(ROWS).count() == 5
    assert "100 %" in table(page) and "untouched photo" in table(page) and "best of 256 recipes" in table(page)
    page.locator("#evaluation .plot circle").first.wait_for()
    page.locator("#evaluation-photos .shot img").first.wait_for()
    assert page.locator("#evaluation-photos .shots-count").inner_text() == "3 photos"
    assert page.evaluate("window.hacked") is None
    assert violations(page) == []

    # Sliders rank anew; the table can be sorted
    before = table(page)
    page.locator("#eval-weight-creativity input[type=range]").evaluate(SET_SLIDER, 0)
    page.wait_for_function("text => document.querySelector('.eval-table tbody').innerText !== text", arg=before)
    page.get_by_role("button", name="Model", exact=True).click()
    assert page.locator(f"{ROWS} th").first.inner_text().startswith("best of 256")
    assert page.locator(".eval-table th[aria-sort=ascending]").inner_text().startswith("Model")

    # Where A loses against B
    page.locator(".shots-order").select_option("loses")
    page.locator(".shots-a").select_option(label="untouched photo")
    page.locator(".shots-b").select_option(label="best of 256 recipes")
    page.wait_for_function("document.querySelector('.shots-count').textContent !== ''")

    # Rename, export, and the same evaluation after a reload
    page.get_by_role("button", name="Rename").click()
    page.locator(".eval-new-name").fill("My evaluation")
    page.get_by_role("button", name="Save", exact=True).last.click()
    page.wait_for_function("document.querySelector('.eval-name').textContent === 'My evaluation'")
    with page.expect_download() as download:
        page.get_by_role("button", name="Report").click()
    assert download.value.suggested_filename.startswith("My-evaluation")
    page.reload()
    page.wait_for_selector("body[data-opened]")
    open_tab(page)
    page.locator(".eval-row", has_text="My evaluation").wait_for()

    # A cell opens the comparison in the Playground
    page.locator("#evaluation-photos .shot").first.click()
    page.wait_for_selector("#candidates .model-column[data-model=one] .card[data-status=ready]")
    assert page.get_by_role("tab", name="Playground").get_attribute("aria-selected") == "true"
    assert page.locator("#candidates .model-column").count() == 3
    assert page.evaluate("window.hacked") is None


def test_it_fits_a_phone_in_dark_mode(open_page: OpenPage) -> None:
    page = open_page(**PHONE, color_scheme="dark")
    open_tab(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert violations(page) == []
