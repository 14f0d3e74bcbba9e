"""The Usage tab in a browser: filters in the URL, charts, downloads, budgets, narrow screens and accessibility."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from previews.github import format_result
from storage.database import Database
from tests.support.app_server import app_server
from tests.support.browser import HOSTILE, violations
from usage.events import Deployment, UsageEvent
from usage.recorder import Recorder

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser
Open = Callable[..., "Page"]
PHONE = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data folder with 300 calls of three branches within the last day."""
    folder = tmp_path_factory.mktemp("usage")
    recorder = Recorder(Database(f"sqlite:///{folder / 'playground.sqlite3'}"), folder / "usage-spool", Deployment())
    now = datetime.now(timezone.utc)
    for index in range(300):
        failed = index % 20 == 0
        recorder.record(
            UsageEvent(
                time=now - timedelta(minutes=4 * index),
                branch=("main", "feature/warm, and more", HOSTILE)[index % 3],
                model=("moondream-tiny", "moondream2")[index % 2],
                skill="recipe",
                outcome="error" if failed else "ok",
                error="provider" if failed else "",
                latency=0.1 + index / 1000,
                cost=0.0001 if index % 2 else None,
                cost_basis="reported" if index % 2 else "unknown",
                reward=0.4,
            )
        )
    recorder.flush()
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    with app_server(folder) as address:
        yield address


def wait_for_dashboard(page: Page) -> Page:
    page.wait_for_selector("#dashboard .dash:not([hidden])")
    return page


def calls(page: Page) -> str:
    return page.locator(".dash-metric", has_text="Calls").locator(".metric-value").inner_text()


def test_filters_are_in_the_url_and_survive_a_reload(open_page: Open) -> None:
    page = open_page()
    page.get_by_role("tab", name="Usage").click()
    wait_for_dashboard(page)
    assert calls(page) == "300"
    page.get_by_role("combobox", name="Branches").click()
    page.get_by_role("option", name="feature/warm, and more").click()
    page.wait_for_function("document.querySelector('.metric-value').textContent === '100'")
    page.get_by_label("model", exact=True).check()
    page.wait_for_url("**usage.by=model**")
    assert "usage.branches=feature%2Fwarm%2C+and+more" in page.url
    page.reload()
    wait_for_dashboard(page)
    page.wait_for_function("document.querySelector('.metric-value').textContent === '100'")
    assert page.get_by_label("model", exact=True).is_checked()
    page.get_by_role("tab", name="Playground").click()
    page.wait_for_function("!location.search.includes('usage.')")


@pytest.mark.parametrize("branch", ["feature/warm, and more", HOSTILE])
def test_link_in_a_preview_comment_opens_the_usage_of_its_branch(open_page: Open, branch: str) -> None:
    deployment = {"url": "https://space", "branch": branch, "sha": "1" * 40, "path": "restart", "seconds": 31.0}
    link = re.search(r"\[of this branch\]\(https://space/\?(\S+)\) \|", format_result(deployment))
    assert link
    page = wait_for_dashboard(open_page(link[1]))
    page.wait_for_function("document.querySelector('.metric-value').textContent === '100'")
    assert page.get_by_role("tab", name="Usage").get_attribute("aria-selected") == "true"


def test_charts_have_tooltips_and_tables_and_names_are_not_interpreted_as_html(open_page: Open) -> None:
    page = wait_for_dashboard(open_page("usage.period=day"))
    assert page.locator(".dash-chart").count() == 6
    page.locator(".chart-frame").first.hover()
    tooltip = page.locator(".chart-tooltip:not([hidden])")
    assert HOSTILE + ": " in tooltip.inner_text() and "main: " in tooltip.inner_text()
    table = page.locator(".dash-chart").first.locator("details")
    table.locator("summary").click()
    assert table.locator("tbody tr").count() >= 20 and table.locator("thead th").count() == 4
    page.evaluate("document.querySelector('.dash-metric').dataset.stale = 'yes'")
    page.wait_for_selector(".dash-metric:not([data-stale])")  # the next refresh has been drawn
    assert table.evaluate("details => details.open")
    assert page.locator("#dashboard img").count() == 0
    assert page.evaluate("window.hacked") is None


def test_selected_branches_are_compared(open_page: Open) -> None:
    page = wait_for_dashboard(open_page("usage.period=day&usage.branches=main&usage.branches=nobody"))
    rows = page.locator(".dash-branches tbody tr")
    rows.nth(1).wait_for()
    assert [text.split("\t")[:2] for text in rows.all_inner_texts()] == [["main", "100"], ["nobody", "0 -100.0 %"]]


def test_filtered_events_are_downloaded_as_csv(open_page: Open, tmp_path: Path) -> None:
    page = wait_for_dashboard(open_page("usage.period=day&usage.branches=main"))
    page.wait_for_function("document.querySelector('.metric-value').textContent === '100'")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    download.value.save_as(tmp_path / "usage.csv")
    lines = (tmp_path / "usage.csv").read_text().splitlines()
    assert len(lines) == 101 and lines[0].startswith("time,") and download.value.suggested_filename.endswith(".csv")


def test_budget_is_set_and_removed_by_keyboard(open_page: Open) -> None:
    page = wait_for_dashboard(open_page("usage.period=day"))
    page.get_by_label("Branch", exact=True).fill("main")
    page.get_by_label("US dollars per month").fill("0.005")
    page.get_by_label("Stop paid calls").check()
    page.get_by_role("button", name="Set budget").press("Enter")
    budget = page.locator(".dash-budget")
    budget.wait_for()
    assert "spent: paid calls are stopped" in budget.inner_text()
    budget.get_by_role("button").press("Enter")
    budget.wait_for(state="detached")


def test_phone_in_dark_mode_does_not_scroll_horizontally_and_axe_finds_no_violations(open_page: Open) -> None:
    page = wait_for_dashboard(open_page("usage.period=day&usage.branches=main&usage.branches=" + "long-" * 30, **PHONE))
    page.wait_for_selector(".dash-chart")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert violations(page) == []


def test_axe_finds_no_violations_in_light_mode(open_page: Open) -> None:
    page = wait_for_dashboard(open_page("usage.period=day", viewport={"width": 1280, "height": 1000}))
    page.wait_for_selector(".dash-chart")
    assert violations(page) == []


def test_empty_dashboard_generates_sample_traffic(browser: Browser, tmp_path: Path) -> None:
    with app_server(tmp_path / "empty") as address:
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.goto(f"{address}/?usage.period=hour")
        page.wait_for_selector(".dash-empty:not([hidden])")
        page.get_by_role("button", name="Generate sample traffic").click()
        page.wait_for_selector(".dash-content:not([hidden])")
        # The calls are recorded as they end, so the first refresh may show a part of them.
        page.locator(".dash-metric", has_text="Calls").locator(".metric-value").get_by_text("8", exact=True).wait_for()
        assert calls(page) == "8"
        page.close()
