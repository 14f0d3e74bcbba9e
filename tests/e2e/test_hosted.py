"""Hosted models in the page, with a played Moondream Cloud over real HTTP: own key, recipes, reasoning, outlines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from inference.registry import MODELS
from tests.e2e.conftest import serving
from tests.e2e.test_page import PHONE, violations
from tests.e2e.test_playground import run
from tests.support.cloud_server import PATH, cloud
from tests.support.fault_server import KEY, Faults, fault_server, malformed

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
Open = Callable[..., "Page"]
TITLE = "Moondream 3 preview"


@pytest.fixture(scope="module")
def played() -> Iterator[Faults]:
    with fault_server() as found:
        found.play(cloud)
        yield found


@pytest.fixture(scope="module")
def server(played: Faults, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An application of this file's own, whose Cloud is the played one and which has no key."""
    before = dict(MODELS)
    settings = {"moondream_url": played.address, "moondream_rate": 500.0}
    with serving(tmp_path_factory.mktemp("hosted"), **settings) as address:
        yield address
    MODELS.clear()
    MODELS.update(before)


def give_key(page: Page, key: str = KEY) -> None:
    page.get_by_role("button", name="Your own Moondream key").click()
    page.locator("#key input").fill(key)
    page.locator("#key input").press("Enter")


def choosable(page: Page) -> None:
    """Until the hosted model is greyed no more."""
    page.wait_for_function("() => !document.querySelector('.picker-box[value=\"moondream3-preview\"]').dataset.reason")


def test_ones_own_key_opens_the_cloud_and_is_kept_nowhere(open_page: Open, played: Faults) -> None:
    page = open_page("models=moondream3-preview&photo=chelsea.jpg&n=4")
    page.locator("#models summary").click()
    greyed = page.locator(".picker-choice.greyed").filter(has_text=TITLE)
    assert "needs a Moondream key" in greyed.inner_text()
    page.keyboard.press("Escape")
    played.play(cloud, malformed, cloud)
    give_key(page)
    choosable(page)
    run(page)
    assert page.locator(".card[data-state=ready]").count() == 3
    failed = page.locator(".card[data-state=failed]")
    assert "something else than JSON" in failed.inner_text()
    assert page.locator(".column-state").inner_text() == "Done · 3 of 4 recipes could be read"
    assert KEY not in page.url and KEY not in page.content()
    page.reload()
    page.wait_for_selector("body[data-opened]")
    page.get_by_role("button", name="Your own Moondream key").click()
    assert page.locator("#key input").input_value() == ""


def test_a_wrong_key_is_said_to_be_one(open_page: Open, played: Faults) -> None:
    played.play(cloud)
    page = open_page("models=moondream3-preview&photo=chelsea.jpg&n=2")
    give_key(page, "md-wrong-key")
    choosable(page)
    run(page)
    error = page.locator(".column-error").inner_text()
    assert "does not accept the key" in error and "md-wrong-key" not in page.content()


def test_reasoning_is_shown_with_what_it_points_at(open_page: Open, played: Faults) -> None:
    played.play(cloud)
    page = open_page("models=moondream3-preview&photo=chelsea.jpg&n=1&skill=query&prompt=How many cats?")
    give_key(page)
    choosable(page)
    page.get_by_label("Think first").check()
    run(page)
    page.locator(".card-thought summary").click()
    assert page.locator(".card-reasoning").inner_text() == "I see cats <b>here</b>."
    assert page.locator(".card-reasoning mark").inner_text() == "cats"
    assert page.locator(".card-marks circle.mark-line").count() == 2
    assert violations(page) == []


def test_an_outline_is_drawn_on_the_photo_on_a_phone_in_the_dark(open_page: Open, played: Faults) -> None:
    played.play(cloud)
    page = open_page(
        "models=moondream3-preview&photo=chelsea.jpg&n=1&skill=segment&prompt=cat", **PHONE, color_scheme="dark"
    )
    give_key(page)
    choosable(page)
    run(page)
    assert page.locator(".card-marks path.mark-line").get_attribute("d") == PATH
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert violations(page) == []
