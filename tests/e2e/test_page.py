"""Tests of the page: invalid uploads, hostile URLs, narrow screens, dark mode, accessibility."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from tests.support.browser import HOSTILE, PHONE, OpenPage, run_comparison, set_weight, violations
from tests.support.invalid_photos import INVALID_PHOTOS

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Request

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("name", INVALID_PHOTOS)
def test_invalid_upload_shows_a_message_and_the_page_still_works(
    open_page: OpenPage, name: str, tmp_path: Path
) -> None:
    page = open_page("models=one&n=1")
    invalid, valid = tmp_path / name, tmp_path / "valid.png"
    invalid.write_bytes(INVALID_PHOTOS[name])
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(valid)
    page.locator("#photo input[type=file]").set_input_files(invalid)
    toast = page.locator(".toast-body, [data-testid=toast-body]").first
    toast.wait_for()
    message = toast.inner_text()
    assert len(message) > 30 and "Traceback" not in message and str(tmp_path) not in message
    page.wait_for_selector("#photo img", state="detached")
    page.locator("#photo input[type=file]").set_input_files(valid)
    page.wait_for_selector("#photo img[src]")
    run_comparison(page)
    assert page.locator(".card[data-status=ready]").count() == 1


def test_run_without_a_photo_shows_a_message(open_page: OpenPage) -> None:
    page = open_page("models=one")
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Upload a photo or choose a sample.").wait_for()
    assert page.locator("#run").is_enabled()


def test_overlong_prompt_shows_a_message(open_page: OpenPage) -> None:
    page = open_page("photo=chelsea.jpg&models=one&skill=query")
    page.locator("#prompt textarea").fill("why? " * 20_000)
    page.wait_for_timeout(500)  # until the settings are in the URL, which each request repeats
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("the limit is 2,000").wait_for()


def test_prompt_that_is_too_long_for_a_link_is_left_out(open_page: OpenPage) -> None:
    page = open_page("photo=chelsea.jpg&models=one&skill=query&n=1", permissions=["clipboard-read", "clipboard-write"])
    page.locator("#prompt textarea").fill("为什么" * 600)
    page.wait_for_timeout(500)
    assert "skill=query" in page.url and "prompt" not in page.url
    page.get_by_role("button", name="Copy link").click()
    page.get_by_role("button", name="Link copied without the prompt, which is too long").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == page.url
    run_comparison(page)
    assert page.locator(".card[data-status=ready]").count() == 1


def test_hostile_prompt_is_not_executed(open_page: OpenPage) -> None:
    page = open_page("photo=chelsea.jpg&models=one&skill=query&n=1")
    page.locator("#prompt textarea").fill("<|endoftext|><script>window.hacked=1</script> ${window.hacked=2} \u202eabc")
    run_comparison(page)
    assert page.evaluate("window.hacked") is None


@pytest.mark.parametrize("name", ["photo", "models", "skill", "n", "temperature", "seed", "reward", "length", "prompt"])
def test_hostile_url_is_refused_and_not_executed(open_page: OpenPage, name: str) -> None:
    page = open_page(f"models=one&{name}={quote(HOSTILE * 20)}")
    if name != "prompt":
        page.get_by_text("Some parameters of this link are invalid").first.wait_for()
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[src=x]").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_has_no_accessibility_violations(open_page: OpenPage, scheme: str) -> None:
    page = open_page("photo=chelsea.jpg&models=one,broken&n=2", color_scheme=scheme)
    assert violations(page) == []
    page.locator("#models summary").click()
    page.get_by_text("Saved reward functions").click()
    assert violations(page) == []
    page.keyboard.press("Escape")
    page.locator("h1").click()
    run_comparison(page)
    assert violations(page) == []


@pytest.mark.parametrize("skill", ["recipe", "query", "detect"])
def test_page_does_not_scroll_sideways_on_a_phone(open_page: OpenPage, skill: str) -> None:
    page = open_page(f"photo=chelsea.jpg&models=one,two,three&n=3&skill={skill}&prompt=cat", **PHONE)
    run_comparison(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    too_wide = page.evaluate(
        "() => [...document.querySelectorAll('.card, .model-column, #inputs > *, #results > *')]"
        ".filter(node => node.getBoundingClientRect().right > 390.5).map(node => node.id || node.className)"
    )
    assert too_wide == []


@pytest.mark.parametrize("skill", ["recipe", "caption"])
@pytest.mark.parametrize(("width", "height"), [(1280, 720), (1400, 1000), (1920, 1080)])
def test_run_button_is_visible_without_scrolling(open_page: OpenPage, width: int, height: int, skill: str) -> None:
    page = open_page(f"photo=chelsea.jpg&skill={skill}", viewport={"width": width, "height": height})
    box, column = page.locator("#run").bounding_box(), page.locator("#inputs").bounding_box()
    assert box is not None and column is not None
    assert box["y"] + box["height"] <= height
    assert column["x"] <= box["x"] and box["x"] + box["width"] <= column["x"] + column["width"]


@pytest.mark.parametrize("settings", [PHONE, {"viewport": {"width": 1400, "height": 900}}])
def test_sliders_stay_visible_while_scrolling(open_page: OpenPage, settings: dict[str, Any]) -> None:
    page = open_page("photo=chelsea.jpg&models=one&n=8", **settings)
    run_comparison(page)
    page.locator(".card").last.scroll_into_view_if_needed()
    page.wait_for_function("() => document.querySelector('#weights').getBoundingClientRect().top === 0")


def test_comparison_can_be_run_by_keyboard(open_page: OpenPage) -> None:
    page = open_page("models=one&n=2")
    page.locator(".sample").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#photo img[src]")
    page.locator("#run").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".model-column[data-status=done]")
    page.locator(".card-divider").first.focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('.card') === document.querySelector('.card')")


def test_page_opens_with_a_comparison_that_the_sliders_rank(open_page: OpenPage, tmp_path: Path) -> None:
    """The example is painted before the page is interactive, and its pictures can be downloaded."""
    page = open_page()
    assert page.locator(".card[data-status=ready] .card-after[src^='data:image/jpeg']").count() == 12
    assert page.locator(".grid-label").inner_text() == "Example"
    assert violations(page) == []
    total = page.locator(".card-total").first.inner_text()
    for name in ("sharpness", "colour"):
        set_weight(page, name, 0)
    page.wait_for_function("total => document.querySelector('.card-total').innerText !== total", arg=total)
    with page.expect_download() as download:
        page.locator(".card-download").first.click()
    assert download.value.suggested_filename.startswith("coffee")
    page.wait_for_url("**reward=creativity:1")
    page.reload()
    page.wait_for_selector("body[data-opened]")
    assert page.locator(".grid-label").is_visible() and page.locator(".card").count() == 12


def test_opening_the_page_joins_the_queue_once(open_page: OpenPage, context: BrowserContext) -> None:
    # If a second queued event ends before its request is answered, Gradio's client opens a stream that nothing closes.
    # A browser opens six connections to a server: a few such tabs would block each other.
    joins: list[str] = []

    def started(request: Request) -> None:
        if "/queue/join" in request.url:
            joins.append(request.url)

    context.on("request", started)
    page = open_page()
    page.wait_for_timeout(1000)
    context.remove_listener("request", started)
    assert len(joins) == 1


def test_empty_page_explains_the_steps(open_page: OpenPage) -> None:
    page = open_page("models=one")
    page.locator(".grid-empty").wait_for()
    text = page.locator(".grid-empty").inner_text()
    assert page.locator(".grid-label").is_hidden() and page.locator(".grid-sort").is_hidden()
    assert page.locator(".grid-status").inner_text() == ""
    for step in ("does not generate images", "Choose a photo", "Run", "demonstration model"):
        assert step in text


@pytest.mark.parametrize(("width", "height"), [(1280, 720), (1400, 900), (1920, 1080), (820, 1180), (390, 844)])
def test_every_control_can_be_reached_and_is_not_covered(open_page: OpenPage, width: int, height: int) -> None:
    """Each control is hit at its centre once it is scrolled into view; on a desktop the photo is beside the cards."""
    page = open_page(viewport={"width": width, "height": height})
    controls = ["#photo img", ".sample >> nth=0", ".sample >> nth=-1", "#skill label >> nth=-1", "#prompt textarea"]
    controls += [
        "#models summary",
        "#n input[type=range]",
        "#temperature input[type=range]",
        "#seed input",
        "#new-seed",
    ]
    controls += ["#run", "#weight-colour input[type=range]", ".card >> nth=-1", "#copy-link"]
    for control in controls:
        locator = page.locator(control).first
        locator.scroll_into_view_if_needed()
        covered_by = locator.evaluate(
            """node => {
              const box = node.getBoundingClientRect();
              const hit = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
              const reached = node.contains(hit) || hit?.contains(node);
              return reached ? '' : hit?.outerHTML ?? 'nothing';
            }"""
        )
        assert covered_by == "", control
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.evaluate("scrollTo(0, 0)")
    photo, card = page.locator("#photo").bounding_box(), page.locator(".card").first.bounding_box()
    assert photo is not None and card is not None
    assert (card["x"] > photo["x"] + photo["width"]) == (width >= 1000)
    cards = page.locator(".card").evaluate_all("nodes => nodes.map(node => node.getBoundingClientRect().right)")
    results = page.locator("#candidates").bounding_box()
    assert results is not None and max(cards) > results["x"] + results["width"] * 0.95  # the columns use the width


def test_run_scrolls_to_the_first_card_on_a_phone(open_page: OpenPage) -> None:
    page = open_page("photo=chelsea.jpg&models=one&n=2", **PHONE)
    run_comparison(page)
    page.wait_for_function(
        "() => { const box = document.querySelector('.card').getBoundingClientRect();"
        " return box.top >= 0 && box.top < innerHeight / 2; }"
    )
