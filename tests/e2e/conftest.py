"""Fixtures of the browser tests: the served application, and pages that fail a test on errors and foreign requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from tests.support.app_server import app_server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page, Request

PAGES = pytest.StashKey[list["OpenedPage"]]()


class OpenedPage:
    """A page of a test, with its open requests.

    Attributes:
        page: The page.
        errors: Its uncaught exceptions.
        hosts: The hosts of its requests.
    """

    def __init__(self, page: Page) -> None:
        """Listen to the page's events."""
        self.page, self.errors, self.hosts = page, list[str](), set[str]()
        self._started: dict[Request, float] = {}
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", self._request_started)
        for event in ("requestfinished", "requestfailed"):
            page.on(event, lambda request: self._started.pop(request, None))

    def _request_started(self, request: Request) -> None:
        self.hosts.add(urlsplit(request.url).netloc)
        self._started[request] = time.monotonic()

    def report(self) -> str:
        """Return what the page displays and its open requests, for the report of a failed test."""
        now = time.monotonic()
        requests = [
            f"{request.method} {urlsplit(request.url).path}, since {now - started:.1f} s"
            for request, started in self._started.items()
        ]
        try:
            text = " | ".join(self.page.locator("body").inner_text(timeout=2000).split("\n"))
        except Exception as error:  # such as a closed page
            text = f"cannot be read: {error}"
        return "\n".join([self.page.url, f"Text: {text[:3000]}", f"Errors: {self.errors}", "Open requests:", *requests])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Add the pages of a failed test to its report."""
    report: Any = yield
    if report.when == "call" and hasattr(report.longrepr, "addsection"):
        for index, page in enumerate(item.stash.get(PAGES, [])):
            report.longrepr.addsection(f"page {index}", page.report())
    return report


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an application that all test files share."""
    with app_server(tmp_path_factory.mktemp("data")) as address:
        yield address


@pytest.fixture(scope="module")
def context(browser: Browser) -> Iterator[BrowserContext]:
    """One browser context per test file, so that its pages share a cache."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    yield context
    context.close()


@pytest.fixture
def open_page(
    request: pytest.FixtureRequest, browser: Browser, context: BrowserContext, server: str
) -> Iterator[Callable[..., Page]]:
    """Open the page with a query string, and fail at the end if a page had an error or requested another host.

    Browser settings (viewport, has_touch, color_scheme) open it in a context of its own.
    """
    opened: list[OpenedPage] = []
    request.node.stash[PAGES] = opened

    def open_(query: str = "", **settings: Any) -> Page:
        page = (browser.new_context(**settings) if settings else context).new_page()
        opened.append(OpenedPage(page))
        page.set_default_timeout(60_000)  # the machine may be busy
        page.goto(f"{server}/?{query}")
        page.wait_for_selector("#candidates .grid-columns", state="attached")
        page.wait_for_selector("#models .picker-choice", state="attached")
        page.wait_for_selector("body[data-opened]")
        if ".jpg" in query:
            page.wait_for_selector("#photo img[src]")
        return page

    yield open_
    for page in (entry.page for entry in opened):
        page.close() if page.context == context else page.context.close()
    assert [error for entry in opened for error in entry.errors] == []
    assert set().union(*(entry.hosts for entry in opened)) - {urlsplit(server).netloc, ""} == set()
