"""The Usage tab in a browser: filters in the URL, charts, downloads, budgets, narrow screens and accessibility."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

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
                model=("moondream2", "moondream-tiny")[index % 2],
                skill="recipe",
                outcome="error" if failed else "ok",
                error="provider" if failed else "",
                latency=0.1 + index / 1000,
                cost=None if index % 2 else 0.0001,
                cost_basis="unknown" if index % 2 else "reported",
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


def test_opened_link_stays_in_the_url(open_page: Open) -> None:
    page = wait_for_dashboard(open_page("usage.period=week&usage.branches=main"))
    for _ in range(2):
        page.wait_for_timeout(1000)
        assert "usage.period=week" in page.url and "usage.branches=main" in page.url
        page.evaluate("document.querySelector('.dash-metric').dataset.stale = 'yes'")
        page.wait_for_selector(".dash-metric:not([data-stale])")  # the next refresh has been drawn
    page.get_by_role("tab", name="Playground").click()
    page.wait_for_function("!location.search.includes('usage.')")


def test_time_zone_is_kept_when_it_is_chosen(open_page: Open) -> None:
    now = datetime.now(timezone.utc)
    start, end = (f"{now + timedelta(days=days):%Y-%m-%d+00:00:00}" for days in (-2, 2))
    page = wait_for_dashboard(open_page(f"usage.period=custom&usage.start={start}&usage.end={end}"))
    zone = page.get_by_label("Time zone")
    zone.fill("Asia/Tokyo")
    zone.press("Enter")
    page.wait_for_url("**usage.zone=Asia%2FTokyo**")
    page.wait_for_timeout(1000)
    assert zone.input_value() == "Asia/Tokyo"


def test_custom_period_begins_as_the_period_that_was_shown(open_page: Open) -> None:
    page = wait_for_dashboard(open_page("usage.period=week"))
    page.get_by_label("custom", exact=True).check()
    page.wait_for_url("**usage.start=**")
    fields = [page.locator(".time-field", has_text=label).locator("input") for label in ("From", "To")]
    start, end = (field.input_value() for field in fields)
    assert datetime.fromisoformat(end) - datetime.fromisoformat(start) == timedelta(days=7)
    assert calls(page) == "300" and page.locator(".dash-error").is_hidden()
    page.reload()
    wait_for_dashboard(page)
    assert fields[0].input_value() == start


@pytest.mark.parametrize("branch", ["feature/warm, and more", HOSTILE])
def test_link_in_a_preview_comment_opens_the_usage_of_its_branch(open_page: Open, branch: str) -> None:
    deployment = {"url": "https://space", "branch": branch, "sha": "1" * 40, "path": "restart", "seconds": 31.0}
    link = re.search(r"\[of this branch\]\(https://space/\?(\S+)\) \|", format_result(deployment))
    assert link
    page = wait_for_dashboard(open_page(link[1]))
    page.wait_for_function("document.querySelector('.metric-value').textContent === '100'")
    assert page.get_by_role("tab", name="Usage").get_attribute("aria-selected") == "true"


def test_charts_show_all_values_hide_lines_and_zoom_into_a_period(open_page: Open) -> None:
    page = wait_for_dashboard(open_page("usage.period=day&usage.zone=Europe/Berlin"))
    assert page.locator(".dash-chart").count() == 6
    assert page.locator(".chart-plot canvas").count() == 4
    assert page.locator("#dashboard svg").count() == 0
    chart = page.locator(".dash-chart").first
    legend, at = chart.locator(".chart-legend button"), chart.locator(".chart-at")
    assert at.inner_text().endswith(", latest")
    # The values of all lines at the pointer, in every chart
    plot = chart.locator(".u-over")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 50)
    page.wait_for_function("!document.querySelector('.chart-at').textContent.endsWith('latest')")
    names = [text.split("\n") for text in legend.all_inner_texts()]
    assert {name for name, _ in names} == {"main", "feature/warm, and more", HOSTILE}
    assert all(int(value) == 5 for _, value in names), "a call every four minutes, of three branches in turn"
    assert page.locator(".chart-at").nth(2).inner_text() == at.inner_text()
    # A name hides its line, and the table stays open, across refreshes
    legend.first.focus()
    page.keyboard.press("Enter")
    assert legend.first.get_attribute("aria-pressed") == "false"
    table = chart.locator("details")
    table.locator("summary").click()
    table.locator("tbody tr").nth(19).wait_for()
    assert table.locator("thead th").count() == 4
    page.evaluate("document.querySelector('.dash-metric').dataset.stale = 'yes'")
    page.wait_for_selector(".dash-metric:not([data-stale])")  # the next refresh has been drawn
    assert table.evaluate("details => details.open") and legend.first.get_attribute("aria-pressed") == "false"
    # A dragged span becomes the period of the whole tab
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.71, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 50, steps=4)
    page.mouse.up()
    page.wait_for_function("document.querySelector('.metric-value').textContent !== '300'")
    page.wait_for_url("**usage.period=custom**")
    assert re.search(r"usage\.start=\d{4}-\d\d-\d\dT\d\d%3A00%3A00", page.url), "bins are whole hours"
    assert page.get_by_label("custom", exact=True).is_checked()
    assert 15 <= int(calls(page)) <= 45 and int(calls(page)) % 15 == 0
    assert "per minute" in chart.inner_text()
    page.get_by_role("button", name="Zoom out").click()
    page.wait_for_function("document.querySelector('.metric-value').textContent === '300'")
    page.wait_for_url("**usage.period=day**")
    assert page.locator(".zoom-out").is_hidden()
    # The same by keyboard
    start = datetime.now(timezone.utc) - timedelta(hours=2)
    page.get_by_label("day", exact=True).focus()
    for _ in range(3):
        page.keyboard.press("Tab")
    page.keyboard.press("Space")
    for label, time in (("From", start), ("To", start + timedelta(hours=1))):
        local = time.astimezone(ZoneInfo("Europe/Berlin"))
        page.locator(".time-field", has_text=label).locator("input").focus()
        for part in ("%m", "%d", "%Y", "\t%I", "%M", "%S", "%p"):  # of the browser's field in English
            page.keyboard.type(local.strftime(part).replace("\t", ""))
            if part == "%Y":
                page.keyboard.press("Tab")
    assert violations(page) == []
    page.wait_for_function("document.querySelector('.metric-value').textContent === '15'")
    assert page.locator("#dashboard img").count() == 0
    assert page.evaluate("window.hacked") is None


def test_lines_end_at_gaps_and_single_values_are_points(open_page: Open) -> None:
    columns = open_page().evaluate(
        """() => {
          const box = document.createElement('div'), hidden = [{show: false}, {show: false}];
          box.style.width = '400px';
          document.body.append(box);
          const chart = new LinePlot(box, {
            height: 100, axes: hidden, scale: {time: false}, range: () => [0, 2], onCursor: () => {},
          });
          const line = {name: 'a', values: [1, 1, null, null, 1, null, 1], stroke: '#f00', width: 2};
          chart.draw([0, 1, 2, 3, 4, 5, 6], [{...line, points: {show: false}}]);
          chart.setRange(0, 6);
          return new Promise(resolve => requestAnimationFrame(() => {
            const {bbox: {left, width}, ctx} = chart.plot;
            const isRed = x => ctx.getImageData(left + x * width / 6, 0, 1, ctx.canvas.height).data
              .some((value, index, all) => index % 4 === 0 && value > 200 && all[index + 3] > 100);
            resolve([0.5, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5].filter(isRed));
            box.remove();
          }));
        }"""
    )
    assert columns == [0.5, 4]


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
    page.get_by_label("US dollars per month").fill("0.0001")  # one call: early in a month there are no more
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
    page.get_by_label("custom", exact=True).check()
    time = page.locator(".time-field input").first
    assert time.evaluate("field => field.offsetWidth") > 200, "the whole time is legible"


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
