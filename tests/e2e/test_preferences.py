"""Tests of choosing between candidates in a real browser."""

from __future__ import annotations

import re
import zipfile
from typing import TYPE_CHECKING

import pytest

from tests.support.browser import PHONE, OpenPage, run_comparison, set_weight, violations

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
QUERY = "photo=chelsea.jpg&models=one,three&n=4&seed=5"
# The side of the shown pair whose candidate has the higher first score, sharpness.
SHARPER = """() => {
  const score = image => {
    const card = [...document.querySelectorAll('.card')].find(card =>
      card.querySelector('.card-after').getAttribute('src') === image.getAttribute('src'));
    return Number(card.querySelector('.card-scores dd span').textContent);
  };
  const [left, right] = [...document.querySelectorAll('.pair-side img')].map(score);
  return left > right ? 'ArrowLeft' : left < right ? 'ArrowRight' : 'ArrowDown';
}"""
SIDES = "[...document.querySelectorAll('.pair-side img')].map(image => image.src).join()"


def lead(page: Page) -> str:
    """Return the line about the agreement."""
    return page.locator(".panel-lead").text_content() or ""


def weights(page: Page) -> list[float]:
    """Return the values of the sliders."""
    return page.locator("#weights input[type=range]").evaluate_all("nodes => nodes.map(node => Number(node.value))")


def press(page: Page, key: str) -> None:
    """Press a key and wait for the next pair."""
    before = page.evaluate(SIDES)
    page.keyboard.press(key)
    page.wait_for_function(f"before => {SIDES} !== before || !document.querySelector('.pair-dialog').open", arg=before)


def test_choices_change_the_sliders_and_are_undone_exported_and_deleted(open_page: OpenPage) -> None:
    page = open_page(QUERY)
    run_comparison(page)
    set_weight(page, "creativity", 0.5)
    page.get_by_role("button", name="Choose between pairs").click()
    page.wait_for_selector(".pair-dialog[open]")
    assert violations(page) == []
    press(page, "ArrowUp")  # a skipped pair is no choice
    for _ in range(10):
        press(page, page.evaluate(SHARPER))
    page.wait_for_function("document.querySelector('.panel-lead').textContent.startsWith('Agrees with')")
    counts = re.match(r"Agrees with (\d+) of (\d+) of your choices \(before: (\d+)\)\.( (\d+) equal)?", lead(page))
    assert counts
    agrees, decided, before = map(int, counts.groups()[:3])
    assert decided + int(counts[5] or 0) == 10 and agrees >= before
    page.keyboard.press("u")
    page.wait_for_function("old => document.querySelector('.panel-lead').textContent !== old", arg=counts.string)
    page.keyboard.press("Escape")
    page.wait_for_selector(".pair-dialog[open]", state="hidden")

    page.locator(".panel-details summary").click()
    assert page.locator(".panel-weights tr").count() == 3
    page.get_by_role("button", name="Apply to sliders").click()
    page.wait_for_function("Number(document.querySelector('#weight-creativity input[type=range]').value) !== 0.5")
    assert weights(page)[0] == max(weights(page)) == 1.0
    page.wait_for_function("location.search.includes('sharpness:1,')")  # the link has the new weights
    page.get_by_role("button", name="Reset sliders").click()
    page.wait_for_function("Number(document.querySelector('#weight-creativity input[type=range]').value) === 0.5")

    old = lead(page)
    page.locator(".card-prefer").last.click()  # from the card that ranks last
    page.wait_for_function("old => document.querySelector('.panel-lead').textContent !== old", arg=old)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download choices").click()
    with zipfile.ZipFile(download.value.path()) as archive:
        rows = archive.read("preferences.jsonl").decode().splitlines()
        assert decided - 1 <= len(rows) - 1 <= decided and "chelsea.jpg" in archive.namelist()
    page.get_by_role("button", name="Undo last choice").click()
    page.wait_for_function("old => document.querySelector('.panel-lead').textContent === old", arg=old)
    page.get_by_role("button", name="Retrain on my choices").click()
    page.wait_for_selector("#tune-form >> visible=true")
    page.get_by_role("tab", name="Playground").click()
    page.get_by_role("button", name="Delete choices").click()
    page.get_by_role("button", name="for good?").click()
    page.wait_for_function("document.querySelector('.panel-lead').textContent.startsWith('Choose the pictures')")
    assert page.get_by_role("button", name="Undo last choice").is_disabled()


def test_choosing_on_a_phone(open_page: OpenPage) -> None:
    page = open_page(QUERY, **PHONE)
    run_comparison(page)
    page.get_by_role("button", name="Choose between pairs").click()
    page.wait_for_selector(".pair-dialog[open]")
    boxes = [image.bounding_box() for image in page.locator(".pair-side img").all()]
    assert all(box and box["width"] > 300 and box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes)
    page.locator(".pair-side").first.click()
    page.wait_for_function("document.querySelector('.panel-lead').textContent.includes('in 2 more pairs')")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_role("button", name="Close").click()
    page.locator(".panel-details summary").click()
    page.get_by_role("button", name="Delete choices").click()
    page.get_by_role("button", name="for good?").click()
    page.wait_for_function("document.querySelector('.panel-lead').textContent.startsWith('Choose the pictures')")
