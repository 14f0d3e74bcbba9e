"""Tests of the Playground for guests in a real browser: models, keys, reward functions, limits and the queue."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from inference.registry import MODELS
from tests.support.app_server import app_server
from tests.support.browser import PHONE, OpenPage, run_comparison, set_weight, violations
from tests.support.cloud_server import cloud
from tests.support.fault_server import KEY, FaultServer, fault_server
from ui.playground import tab
from ui.playground.samples import SAMPLES

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
CAT = str(SAMPLES["chelsea.jpg"].path)
CLOUD_MODEL = "moondream3-preview"
MAX_RUNNING = 3  # on this server, so that a few pages fill it


@pytest.fixture(scope="module")
def simulated_cloud() -> Iterator[FaultServer]:
    with fault_server() as server:
        server.respond_with(cloud)
        yield server


@pytest.fixture(scope="module")
def server(simulated_cloud: FaultServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an application with a key of its own, in which visitors are guests."""
    original = dict(MODELS)
    settings = {"moondream_url": simulated_cloud.address, "moondream_key": KEY, "moondream_rate": 500.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tab, "MAX_COMPARISONS", MAX_RUNNING)
        with app_server(tmp_path_factory.mktemp("guests"), host="0.0.0.0", **settings) as address:
            yield address
    MODELS.clear()
    MODELS.update(original)


def click_run(page: Page) -> None:
    page.get_by_role("button", name="Run", exact=True).click()


def open_saved(page: Page) -> None:
    page.get_by_text("Saved reward functions").click()


def save_as(page: Page, name: str) -> None:
    page.locator("#reward-name textarea, #reward-name input").fill(name)
    page.get_by_role("button", name="Save", exact=True).click()
    page.get_by_text(f"Saved as “{name}”.").wait_for()


def choose_saved(page: Page, name: str) -> None:
    """Choose a reward function with the keyboard, because the list moves while the accordion opens."""
    page.locator("#saved input").fill(name)
    page.locator("#saved input").press("Enter")


def saved_options(page: Page) -> list[str]:
    """Return the labels in the drop-down of saved reward functions."""
    page.locator("#saved input").click()
    page.wait_for_timeout(200)
    labels = page.get_by_role("option").all_inner_texts()
    page.keyboard.press("Escape")
    return [label.replace("✓", "").strip() for label in labels]


def test_cloud_models_need_the_guests_own_key(open_page: OpenPage, simulated_cloud: FaultServer) -> None:
    page = open_page(f"models={CLOUD_MODEL}&photo=chelsea.jpg&n=1")
    page.locator("#models summary").click()
    choice = page.locator(f".picker-choice:has(input[value='{CLOUD_MODEL}'])")
    assert "only an administrator may use this deployment's key" in choice.inner_text()
    page.keyboard.press("Escape")
    before = len(simulated_cloud.requests)
    run_comparison(page)  # the link has selected the model although the picker disables it
    assert "Enter your own under “Moondream API key”" in page.locator(".column-error").inner_text()
    assert len(simulated_cloud.requests) == before
    page.get_by_role("button", name="Moondream API key").click()
    page.locator("#key input").fill(KEY)
    page.locator("#key input").press("Enter")
    page.wait_for_function(f"() => !document.querySelector('.picker-box[value=\"{CLOUD_MODEL}\"]').dataset.reason")
    run_comparison(page)
    assert page.locator(".card[data-status=ready]").count() == 1
    assert len(simulated_cloud.requests) == before + 1


def test_api_client_is_a_guest(server: str, simulated_cloud: FaultServer) -> None:
    client = Client(server, verbose=False)
    reasons = {model["name"]: model["unavailable"] for model in client.predict(api_name="/models")}
    assert "only an administrator" in reasons[CLOUD_MODEL] and reasons["one"] is None
    before = len(simulated_cloud.requests)
    names = [CLOUD_MODEL, "one"]
    result = client.predict(handle_file(CAT), names, "recipe", "", 1, 1.0, 1, api_name="/compare")
    errors = {model["model"]: model["error"] for model in result["models"]}
    assert "Enter your own under" in errors[CLOUD_MODEL] and errors["one"] is None
    assert len(simulated_cloud.requests) == before
    with pytest.raises(AppError, match="Sign in"):
        client.predict("by guest", {"colour": 1}, api_name="/save_reward_function")


def test_guests_reward_functions_stay_in_the_browser(open_page: OpenPage) -> None:
    page = open_page("reward=sharpness:0.2,colour:0.4")
    open_saved(page)
    page.get_by_text("Saved in this browser.", exact=True).wait_for()
    save_as(page, "quiet")
    page.reload()
    page.wait_for_selector("body[data-opened]")
    set_weight(page, "sharpness", 1)
    open_saved(page)
    choose_saved(page, "quiet")
    page.wait_for_function("() => document.querySelector('#weight-sharpness input[type=range]').value === '0.2'")
    page.locator("#reward-name textarea, #reward-name input").fill("calm")
    page.get_by_role("button", name="Rename").click()
    page.wait_for_function("() => document.querySelector('#saved input').value === 'calm'")
    other = open_page("", viewport={"width": 1280, "height": 900})  # another browser
    open_saved(other)
    assert saved_options(other) == []
    page.reload()
    page.wait_for_selector("body[data-opened]")
    open_saved(page)
    assert saved_options(page) == ["calm"]
    choose_saved(page, "calm")
    page.wait_for_function("() => document.querySelector('#reward-name textarea, #reward-name input').value === 'calm'")
    page.get_by_role("button", name="Delete").click()
    page.get_by_text("“calm” was deleted.").wait_for()
    assert saved_options(page) == []


def test_saving_a_reward_function_keeps_the_guests_photo_and_results(open_page: OpenPage) -> None:
    page = open_page("models=one&n=1", viewport={"width": 1280, "height": 900})
    page.locator("#photo input[type=file]").set_input_files(CAT)
    page.wait_for_selector("#photo img[src*='/file=']")
    run_comparison(page)
    photo = page.locator("#photo img").get_attribute("src")
    open_saved(page)
    save_as(page, "quiet")
    page.wait_for_timeout(1000)
    assert page.locator("#photo img").get_attribute("src", timeout=1000) == photo
    assert page.locator(".card[data-status=ready]").count() == 1


def test_damaged_browser_storage_does_not_break_the_page(open_page: OpenPage) -> None:
    page = open_page("", viewport={"width": 1280, "height": 900})
    open_saved(page)
    save_as(page, "kept")
    page.evaluate("localStorage.setItem('playground-reward-functions', '\"damaged\"')")
    page.reload()
    page.wait_for_selector("body[data-opened]")
    open_saved(page)
    assert saved_options(page) == []
    save_as(page, "new")
    assert saved_options(page) == ["new"]


def test_third_comparison_of_a_browser_is_refused_until_one_is_cancelled(open_page: OpenPage) -> None:
    # Contexts that share a cookie: one browser would open six connections in all, one per page and running event.
    query, viewport = "photo=chelsea.jpg&models=slow&n=8", {"width": 1280, "height": 900}
    pages = [open_page(query, viewport=viewport)]
    state = pages[0].context.storage_state()
    pages += [open_page(query, viewport=viewport, storage_state=state) for _ in range(2)]
    for page in pages[:2]:
        click_run(page)
        page.wait_for_selector(".model-column[data-status=running]")
    click_run(pages[2])
    pages[2].get_by_text("You have 2 comparisons running. Wait for one to finish or cancel it.").wait_for()
    pages[0].get_by_role("button", name="Cancel").click()
    pages[0].wait_for_selector(".model-column[data-status=cancelled]")
    click_run(pages[2])
    pages[2].wait_for_selector(".model-column[data-status=running]")
    pages[1].reload()  # a closed page gives its place back
    pages[1].wait_for_selector("#photo img[src]")
    click_run(pages[1])
    pages[1].wait_for_selector(".model-column[data-status=running]")


def test_waiting_comparison_shows_its_position(open_page: OpenPage) -> None:
    settings = {"viewport": {"width": 1280, "height": 900}}
    running = [open_page("photo=chelsea.jpg&models=slow&n=8", **settings) for _ in range(MAX_RUNNING)]
    first, second = (open_page("photo=coffee.jpg&models=one&n=1", **settings) for _ in range(2))
    for page in running:
        click_run(page)
    for page in running:
        page.wait_for_selector(".model-column[data-status=running]")
    click_run(first)
    first.get_by_text("Busy: position 1 in the queue. Your comparison is next.").wait_for()
    click_run(second)
    second.get_by_text("Busy: position 2 in the queue. 1 comparison waits before yours.").wait_for()
    assert violations(second) == []
    running[0].get_by_role("button", name="Cancel").click()
    for page in (first, second):
        page.wait_for_selector(".model-column[data-status=done]")
        page.locator(".grid-busy").wait_for(state="hidden")
    assert first.evaluate("getComputedStyle(document.querySelector('#candidates .html-container')).opacity") == "1"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_guest_page_fits_a_phone(open_page: OpenPage, scheme: str) -> None:
    page = open_page("photo=chelsea.jpg&models=one,two&n=2", **PHONE, color_scheme=scheme)
    open_saved(page)
    page.locator("#models summary").click()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    title, account = page.locator("#banner h1").bounding_box(), page.locator("#account p").bounding_box()
    assert account["y"] >= title["y"] + title["height"] or account["x"] >= title["x"] + title["width"]
    assert violations(page) == []
