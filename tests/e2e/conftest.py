"""The real application on a free port, with models of the tests beside its own; and pages that tell what went wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
import uvicorn

import app
from inference import registry as models
from settings import Settings
from tests.support import fake_backend
from tests.training.runs.test_queue import FAKE

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

FAKES = ("one", "two", "three", "slow", "broken", "bug", "queued", "prose", "hostile")
PLAIN = ("one", "two", "three")


@contextmanager
def serving(folder: Path, training: tuple[str, ...] = FAKE, **settings: Any) -> Iterator[str]:
    """The address of the application, served by uvicorn as `python app.py` does; by default its runs learn nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.BACKENDS, "fake", "tests.support.fake_backend")
        for name in FAKES:
            patch.setitem(models.MODELS, name, fake_backend.entry(name, "" if name in PLAIN else name))
        application = app.create_app(Settings(data_dir=folder, **settings), training=training)
        running = uvicorn.Server(uvicorn.Config(application, host="127.0.0.1", port=0, log_level="warning"))
        thread = threading.Thread(target=running.run, daemon=True)
        thread.start()
        while not running.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
        running.should_exit = True
        thread.join(10)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an application that all files of tests share."""
    with serving(tmp_path_factory.mktemp("data")) as address:
        yield address


@pytest.fixture(scope="module")
def context(browser: Browser) -> Iterator[BrowserContext]:
    """One browser context for a file's tests: what the first page has fetched the others find in its cache."""
    shared_components = browser.new_context(viewport={"width": 1400, "height": 1000})
    yield shared_components
    shared_components.close()


@pytest.fixture
def open_page(browser: Browser, context: BrowserContext, server: str) -> Iterator[Callable[..., Page]]:
    """Opens the page with a query string; at the end no page may have met an error or asked another host.

    Settings of the browser (viewport, has_touch, color_scheme) open it in a context of its own.
    """
    pages: list[Page] = []
    errors: list[str] = []
    hosts: set[str] = set()

    def opened(query: str = "", **settings: Any) -> Page:
        page = (browser.new_context(**settings) if settings else context).new_page()
        pages.append(page)
        page.set_default_timeout(60_000)  # a machine may be busy
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.goto(f"{server}/?{query}")
        page.wait_for_selector("#candidates .grid-columns", state="attached")
        page.wait_for_selector("#models .picker-choice", state="attached")
        page.wait_for_selector("body[data-opened]")
        if ".jpg" in query:
            page.wait_for_selector("#photo img[src]")
        return page

    yield opened
    for page in pages:
        page.close() if page.context == context else page.context.close()
    assert errors == []
    assert hosts - {urlsplit(server).netloc, ""} == set()
