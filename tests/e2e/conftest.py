"""The real application on a free port, with models of the tests beside its own; and pages that tell what went wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
import uvicorn

import app
from inference import models
from settings import Settings
from tests.ui import fake_backend

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

FAKES = ("one", "two", "three", "slow", "broken", "bug", "queued", "prose", "hostile")
PLAIN = ("one", "two", "three")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the application, served by uvicorn as `python app.py` does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.BACKENDS, "fake", "tests.ui.fake_backend")
        for name in FAKES:
            patch.setitem(models.MODELS, name, fake_backend.entry(name, "" if name in PLAIN else name))
        application = app.create_app(Settings(data_dir=tmp_path_factory.mktemp("data")))
        running = uvicorn.Server(uvicorn.Config(application, host="127.0.0.1", port=0, log_level="warning"))
        thread = threading.Thread(target=running.run, daemon=True)
        thread.start()
        while not running.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
        running.should_exit = True
        thread.join(10)


@pytest.fixture
def open_page(browser: Browser, server: str) -> Iterator[Callable[..., Page]]:
    """Opens the page with a query string; at the end no page may have met an error or asked another host."""
    contexts, errors, hosts = [], [], set()

    def opened(query: str = "", width: int = 1400, height: int = 1000, **settings: object) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, **settings)  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: hosts.add(request.url.split("/")[2] if "//" in request.url else ""))
        page.goto(f"{server}/?{query}")
        page.wait_for_selector("#candidates .grid-columns", state="attached")
        page.wait_for_selector("#models .picker-choice", state="attached")
        if "photo=" in query:
            page.wait_for_selector("#photo img[src]")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert errors == []
    assert hosts - {server.split("/")[2], ""} == set()
