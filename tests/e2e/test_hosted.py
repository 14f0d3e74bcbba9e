"""Tests of hosted models in the page, with a fake Moondream Cloud: API key, recipes, reasoning, outlines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from inference.registry import MODELS
from tests.support.app_server import app_server
from tests.support.browser import PHONE, OpenPage, run_comparison, violations
from tests.support.cloud_server import PATH, cloud
from tests.support.fault_server import KEY, FaultServer, fault_server, malformed_json

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
TITLE = "Moondream 3 preview"


@pytest.fixture(scope="module")
def fake_cloud() -> Iterator[FaultServer]:
    with fault_server() as server:
        server.respond_with(cloud)
        yield server


@pytest.fixture(scope="module")
def server(fake_cloud: FaultServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an application that uses the fake cloud and has no key of its own."""
    original = dict(MODELS)
    settings = {"moondream_url": fake_cloud.address, "moondream_rate": 500.0}
    with app_server(tmp_path_factory.mktemp("hosted"), **settings) as address:
        yield address
    MODELS.clear()
    MODELS.update(original)


def enter_key(page: Page, key: str = KEY) -> None:
    page.get_by_role("button", name="Moondream API key").click()
    page.locator("#key input").fill(key)
    page.locator("#key input").press("Enter")


def wait_until_available(page: Page) -> None:
    """Wait until the hosted model can be selected."""
    page.wait_for_function("() => !document.querySelector('.picker-box[value=\"moondream3-preview\"]').dataset.reason")


def test_users_key_enables_hosted_models_and_is_not_stored(open_page: OpenPage, fake_cloud: FaultServer) -> None:
    page = open_page("models=moondream3-preview&photo=chelsea.jpg&n=4")
    page.locator("#models summary").click()
    disabled = page.locator(".picker-choice.disabled").filter(has_text=TITLE)
    assert "needs a Moondream API key" in disabled.inner_text()
    page.keyboard.press("Escape")
    fake_cloud.respond_with(cloud, malformed_json, cloud)
    enter_key(page)
    wait_until_available(page)
    run_comparison(page)
    assert page.locator(".card[data-status=ready]").count() == 3
    failed = page.locator(".card[data-status=failed]")
    assert "did not return a JSON object" in failed.inner_text()
    assert page.locator(".column-status").inner_text() == "Done · 3 of 4 recipes are valid"
    assert KEY not in page.url and KEY not in page.content()
    page.reload()
    page.wait_for_selector("body[data-opened]")
    page.get_by_role("button", name="Moondream API key").click()
    assert page.locator("#key input").input_value() == ""


def test_invalid_key_shows_a_message_without_the_key(open_page: OpenPage, fake_cloud: FaultServer) -> None:
    fake_cloud.respond_with(cloud)
    page = open_page("models=moondream3-preview&photo=chelsea.jpg&n=2")
    enter_key(page, "md-wrong-key")
    wait_until_available(page)
    run_comparison(page)
    error = page.locator(".column-error").inner_text()
    assert "does not accept the key" in error and "md-wrong-key" not in page.content()


def test_reasoning_highlights_the_text_that_refers_to_points(open_page: OpenPage, fake_cloud: FaultServer) -> None:
    fake_cloud.respond_with(cloud)
    page = open_page("models=moondream3-preview&photo=chelsea.jpg&n=1&skill=query&prompt=How many cats?")
    enter_key(page)
    wait_until_available(page)
    page.get_by_label("Reasoning").check()
    run_comparison(page)
    page.locator(".card-reasoning-details summary").click()
    assert page.locator(".card-reasoning").inner_text() == "I see cats <b>here</b>."
    assert page.locator(".card-reasoning mark").inner_text() == "cats"
    assert page.locator(".card-regions circle.region-line").count() == 2
    assert violations(page) == []


def test_outline_is_drawn_on_a_phone_in_dark_mode(open_page: OpenPage, fake_cloud: FaultServer) -> None:
    fake_cloud.respond_with(cloud)
    page = open_page(
        "models=moondream3-preview&photo=chelsea.jpg&n=1&skill=segment&prompt=cat", **PHONE, color_scheme="dark"
    )
    enter_key(page)
    wait_until_available(page)
    run_comparison(page)
    assert page.locator(".card-regions path.region-line").get_attribute("d") == PATH
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert violations(page) == []
