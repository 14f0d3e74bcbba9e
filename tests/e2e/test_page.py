"""The page as a page: bad uploads, hostile addresses, narrow screens, darkness, and what axe-core finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from tests.ui.playground.test_photo import BAD

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
Open = Callable[..., "Page"]
AXE = Path(__file__).parents[1] / "support" / "vendor" / "axe-core-4.14.1.min.js"
# Gradio's own: the image input's drop zone is a button whose name differs from its text.
NOT_OURS = {"label-content-name-mismatch"}
PHONE = {"viewport": {"width": 390, "height": 844}}


def run(page: Page) -> None:
    page.get_by_role("button", name="Run", exact=True).click()
    page.wait_for_selector(".model-column[data-status=done]")
    page.wait_for_selector("#run:not([disabled])")


def violations(page: Page) -> list[str]:
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [
        f"{one['id']}: {node['html'][:160]} {node['failureSummary']}"
        for one in found
        if one["id"] not in NOT_OURS
        for node in one["nodes"]
    ]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_upload_is_refused_in_words_and_the_page_lives_on(open_page: Open, name: str, tmp_path: Path) -> None:
    page = open_page("models=one&n=1")
    bad, good = tmp_path / name, tmp_path / "good.png"
    bad.write_bytes(BAD[name])
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(good)
    page.locator("#photo input[type=file]").set_input_files(bad)
    toast = page.locator(".toast-body, [data-testid=toast-body]").first
    toast.wait_for()
    said = toast.inner_text()
    assert len(said) > 30 and "Traceback" not in said and str(tmp_path) not in said
    page.wait_for_selector("#photo img", state="detached")
    page.locator("#photo input[type=file]").set_input_files(good)
    page.wait_for_selector("#photo img[src]")
    run(page)
    assert page.locator(".card[data-state=ready]").count() == 1


def test_running_without_a_photo_says_what_to_do(open_page: Open) -> None:
    page = open_page("models=one")
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Upload one or choose a sample.").wait_for()
    assert page.locator("#run").is_enabled()


def test_an_endless_prompt_is_refused_in_words(open_page: Open) -> None:
    page = open_page("photo=chelsea.jpg&models=one&skill=query")
    page.locator("#prompt textarea").fill("why? " * 20_000)
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("2,000 can be read").wait_for()


def test_a_hostile_prompt_is_only_text(open_page: Open) -> None:
    page = open_page("photo=chelsea.jpg&models=one&skill=query&n=1")
    page.locator("#prompt textarea").fill("<|endoftext|><script>window.hacked=1</script> ${window.hacked=2} \u202eabc")
    run(page)
    assert page.evaluate("window.hacked") is None


HOSTILE = "<img src=x onerror=window.hacked=1>${window.hacked=2}"


@pytest.mark.parametrize("name", ["photo", "models", "skill", "n", "temperature", "seed", "reward", "length", "prompt"])
def test_a_hostile_address_is_refused_and_runs_nothing(open_page: Open, name: str) -> None:
    page = open_page(f"models=one&{name}={quote(HOSTILE * 20)}")
    if name != "prompt":
        page.get_by_text("Not everything in this link could be used").first.wait_for()
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[src=x]").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_of_ours(open_page: Open, scheme: str) -> None:
    page = open_page("photo=chelsea.jpg&models=one,broken&n=2", color_scheme=scheme)
    assert violations(page) == []
    page.locator("#models summary").click()
    page.get_by_text("Save, load and share reward functions").click()
    assert violations(page) == []
    page.keyboard.press("Escape")
    page.locator("h1").click()
    run(page)
    assert violations(page) == []


@pytest.mark.parametrize("skill", ["recipe", "query", "detect"])
def test_a_phone_scrolls_in_one_direction_only(open_page: Open, skill: str) -> None:
    page = open_page(f"photo=chelsea.jpg&models=one,two,three&n=3&skill={skill}&prompt=cat", **PHONE)
    run(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    wide = page.evaluate(
        "() => [...document.querySelectorAll('.card, .model-column, #ask > *, #results > *')]"
        ".filter(part => part.getBoundingClientRect().right > 390.5).map(part => part.id || part.className)"
    )
    assert wide == []


@pytest.mark.parametrize("skill", ["recipe", "caption"])
@pytest.mark.parametrize(("width", "height"), [(1280, 720), (1400, 1000), (1920, 1080)])
def test_run_is_in_sight_at_once(open_page: Open, width: int, height: int, skill: str) -> None:
    page = open_page(f"photo=chelsea.jpg&skill={skill}", viewport={"width": width, "height": height})
    box, column = page.locator("#run").bounding_box(), page.locator("#ask").bounding_box()
    assert box is not None and column is not None
    assert box["y"] + box["height"] <= height
    assert column["x"] <= box["x"] and box["x"] + box["width"] <= column["x"] + column["width"]


@pytest.mark.parametrize("settings", [PHONE, {"viewport": {"width": 1400, "height": 900}}])
def test_the_sliders_stay_in_sight_above_the_results(open_page: Open, settings: dict[str, Any]) -> None:
    page = open_page("photo=chelsea.jpg&models=one&n=8", **settings)
    run(page)
    page.locator(".card").last.scroll_into_view_if_needed()
    page.wait_for_function("() => document.querySelector('#weights').getBoundingClientRect().top === 0")


def test_the_whole_click_by_keyboard(open_page: Open) -> None:
    page = open_page("models=one&n=2")
    page.locator(".sample").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#photo img[src]")
    page.locator("#run").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".model-column[data-status=done]")
    page.locator(".card-compare").first.focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('.card') === document.querySelector('.card')")


def test_the_empty_page_says_what_to_do(open_page: Open) -> None:
    page = open_page()
    words = page.locator(".grid-empty").inner_text()
    for said in ("writes text, it makes no images", "Choose a photo", "Run", "demonstration model"):
        assert said in words
