"""The Usage tab in a browser: filters in the address, charts with values, names as text, downloads, phones, axe."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from previews.github import words
from storage.database import Database
from tests.e2e.conftest import serving
from tests.e2e.test_page import violations
from tests.ui.usage.test_tab import HOSTILE
from usage.events import Deployment, Event
from usage.recorder import Recorder

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser
Open = Callable[..., "Page"]
PHONE = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with 300 calls of three branches within the last day."""
    made = tmp_path_factory.mktemp("usage")
    recorder = Recorder(Database(f"sqlite:///{made / 'playground.sqlite3'}"), made / "usage-spool", Deployment())
    now = datetime.now(timezone.utc)
    for place in range(300):
        failed = place % 20 == 0
        recorder.record(
            Event(
                time=now - timedelta(minutes=4 * place),
                branch=("main", "feature/warm, and more", HOSTILE)[place % 3],
                model=("moondream-tiny", "moondream2")[place % 2],
                skill="recipe",
                outcome="error" if failed else "ok",
                error="provider" if failed else "",
                latency=0.1 + place / 1000,
                cost=0.0001 if place % 2 else None,
                cost_basis="reported" if place % 2 else "unknown",
                reward=0.4,
            )
        )
    recorder.flush()
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    with serving(folder) as address:
        yield address


def opened(page: Page) -> Page:
    page.wait_for_selector("#dashboard .dash:not([hidden])")
    return page


def calls(page: Page) -> str:
    return page.locator(".dash-figure", has_text="Calls").locator(".figure-value").inner_text()


def test_filters_are_in_the_address_and_survive_a_reload(open_page: Open) -> None:
    page = open_page()
    page.get_by_role("tab", name="Usage").click()
    opened(page)
    assert calls(page) == "300"
    page.get_by_role("combobox", name="Branches").click()
    page.get_by_role("option", name="feature/warm, and more").click()
    page.wait_for_function("document.querySelector('.figure-value').textContent === '100'")
    page.get_by_label("model", exact=True).check()
    page.wait_for_url("**usage.by=model**")
    assert "usage.branches=feature%2Fwarm%2C+and+more" in page.url
    page.reload()
    opened(page)
    page.wait_for_function("document.querySelector('.figure-value').textContent === '100'")
    assert page.get_by_label("model", exact=True).is_checked()
    page.get_by_role("tab", name="Playground").click()
    page.wait_for_function("!location.search.includes('usage.')")


@pytest.mark.parametrize("branch", ["feature/warm, and more", HOSTILE])
def test_a_previews_comment_links_to_the_usage_of_its_branch(open_page: Open, branch: str) -> None:
    told = {"url": "https://space", "branch": branch, "sha": "1" * 40, "path": "restart", "seconds": 31.0}
    link = re.search(r"\[of this branch\]\(https://space/\?(\S+)\) \|", words(told))
    assert link
    page = opened(open_page(link[1]))
    page.wait_for_function("document.querySelector('.figure-value').textContent === '100'")
    assert page.get_by_role("tab", name="Usage").get_attribute("aria-selected") == "true"


def test_charts_tell_their_values_and_names_are_only_text(open_page: Open) -> None:
    page = opened(open_page("usage.period=day"))
    assert page.locator(".dash-chart").count() == 6
    page.locator(".chart-frame").first.hover()
    tip = page.locator(".chart-tip:not([hidden])")
    assert HOSTILE + ": " in tip.inner_text() and "main: " in tip.inner_text()
    table = page.locator(".dash-chart").first.locator("details")
    table.locator("summary").click()
    assert table.locator("tbody tr").count() >= 20 and table.locator("thead th").count() == 4
    page.wait_for_timeout(6_000)  # a refresh later it is still open
    assert table.evaluate("part => part.open")
    assert page.locator("#dashboard img").count() == 0
    assert page.evaluate("window.hacked") is None


def test_branches_stand_side_by_side(open_page: Open) -> None:
    page = opened(open_page("usage.period=day&usage.branches=main&usage.branches=nobody"))
    rows = page.locator(".dash-branches tbody tr")
    rows.nth(1).wait_for()
    assert [text.split("\t")[:2] for text in rows.all_inner_texts()] == [["main", "100"], ["nobody", "0"]]


def test_the_filtered_events_are_downloaded(open_page: Open, tmp_path: Path) -> None:
    page = opened(open_page("usage.period=day&usage.branches=main"))
    page.wait_for_function("document.querySelector('.figure-value').textContent === '100'")
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download as csv").click()
    waiting.value.save_as(tmp_path / "usage.csv")
    lines = (tmp_path / "usage.csv").read_text().splitlines()
    assert len(lines) == 101 and lines[0].startswith("time,") and waiting.value.suggested_filename.endswith(".csv")


def test_a_budget_is_set_and_removed_by_keyboard(open_page: Open) -> None:
    page = opened(open_page("usage.period=day"))
    page.get_by_label("Branch", exact=True).fill("main")
    page.get_by_label("US dollars a month").fill("0.005")
    page.get_by_label("Stop paid calls").check()
    page.get_by_role("button", name="Set budget").press("Enter")
    budget = page.locator(".dash-budget")
    budget.wait_for()
    assert "spent: paid calls are stopped" in budget.inner_text()
    budget.get_by_role("button").press("Enter")
    budget.wait_for(state="detached")


def test_on_a_phone_in_the_dark_nothing_is_cut_off_and_axe_finds_nothing(open_page: Open) -> None:
    page = opened(open_page("usage.period=day&usage.branches=main&usage.branches=" + "long-" * 30, **PHONE))
    page.wait_for_selector(".dash-chart")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert violations(page) == []


def test_axe_finds_nothing_in_the_light(open_page: Open) -> None:
    page = opened(open_page("usage.period=day", viewport={"width": 1280, "height": 1000}))
    page.wait_for_selector(".dash-chart")
    assert violations(page) == []


def test_a_quiet_dashboard_offers_a_demonstration(browser: Browser, tmp_path: Path) -> None:
    with serving(tmp_path / "empty") as address:
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.goto(f"{address}/?usage.period=hour")
        page.wait_for_selector(".dash-quiet:not([hidden])")
        page.get_by_role("button", name="Make a small demonstration load").click()
        page.wait_for_selector(".dash-all:not([hidden])")
        assert calls(page) == "8"
        page.close()
