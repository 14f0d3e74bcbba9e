"""Fixtures of the browser tests: the served application, and pages that fail a test on errors and foreign requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from tests.support.app_server import app_server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page


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
def open_page(browser: Browser, context: BrowserContext, server: str) -> Iterator[Callable[..., Page]]:
    """Open the page with a query string, and fail at the end if a page had an error or requested another host.

    Browser settings (viewport, has_touch, color_scheme) open it in a context of its own.
    """
    pages: list[Page] = []
    errors: list[str] = []
    hosts: set[str] = set()

    def open_(query: str = "", **settings: Any) -> Page:
        page = (browser.new_context(**settings) if settings else context).new_page()
        pages.append(page)
        page.set_default_timeout(60_000)  # the machine may be busy
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.goto(f"{server}/?{query}")
        page.wait_for_selector("#candidates .grid-columns", state="attached")
        page.wait_for_selector("#models .picker-choice", state="attached")
        page.wait_for_selector("body[data-opened]")
        if ".jpg" in query:
            page.wait_for_selector("#photo img[src]")
        return page

    yield open_
    for page in pages:
        page.close() if page.context == context else page.context.close()
    assert errors == []
    assert hosts - {urlsplit(server).netloc, ""} == set()
