"""Browser tests where cookies are blocked, and of the page in a frame on another site, as a Space is shown."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from access.control import SESSION_COOKIE, SESSION_HEADER
from tests.support.app_server import app_server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Frame, Page, Request, Route

pytestmark = pytest.mark.browser
QUERY = "?photo=chelsea.jpg&n=1&models="
JPEG = b"\xff\xd8"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with app_server(tmp_path_factory.mktemp("data")) as address:
        yield address


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1400, "height": 1200})
    context.set_default_timeout(60_000)  # the machine may be busy
    yield context
    context.close()


class _OuterPage(BaseHTTPRequestHandler):
    """Answers with a page that shows the application in a frame, opened with the same query."""

    server: _OuterServer

    def do_GET(self) -> None:
        source = f"{self.server.application}{self.path}".replace("&", "&amp;")
        content = f'<!doctype html><iframe src="{source}" width="1350" height="1150"></iframe>'.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


class _OuterServer(ThreadingHTTPServer):
    def __init__(self, application: str) -> None:
        super().__init__(("127.0.0.1", 0), _OuterPage)
        self.application = application


@contextmanager
def other_site(application: str) -> Iterator[str]:
    """Serve a page with a frame on another site than the application: localhost instead of 127.0.0.1."""
    with _OuterServer(application) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()


def open_playground(page: Page, address: str, model: str) -> Page | Frame:
    """Open the Playground with a model, and return the frame that it is in."""
    page.goto(f"{address}/{QUERY}{model}")
    frame = page.frames[-1]
    frame.wait_for_selector("body[data-opened]", state="attached")
    frame.wait_for_selector("#photo img[src]")
    return frame


def use_playground(page: Page, address: str, folder: Path) -> None:
    """Cancel a comparison, run another, and download its picture in full size."""
    frame = open_playground(page, address, "slow")
    frame.get_by_role("button", name="Run", exact=True).click()
    frame.wait_for_selector(".model-column[data-status=running]")
    frame.get_by_role("button", name="Cancel", exact=True).click()
    frame.wait_for_selector(".model-column[data-status=cancelled]")
    frame = open_playground(page, address, "one")
    frame.get_by_role("button", name="Run", exact=True).click()
    frame.wait_for_selector(".model-column[data-status=done]")
    with page.expect_download() as started:
        frame.locator(".card-download").first.click()
    started.value.save_as(folder / "picture.jpg")
    assert (folder / "picture.jpg").read_bytes().startswith(JPEG)


def record_requests(context: BrowserContext) -> list[Request]:
    """Return a list to which every request that queues a call is added."""
    requests: list[Request] = []
    context.on("request", lambda request: requests.append(request) if "/queue/join" in request.url else None)
    return requests


def test_the_playground_works_without_cookies(context: BrowserContext, server: str, tmp_path: Path) -> None:
    def without_cookies(route: Route) -> None:
        response = httpx.get(route.request.url)
        assert SESSION_COOKIE in response.headers["set-cookie"]
        route.fulfill(status=response.status_code, body=response.content, content_type="text/html")

    context.route(lambda url: url.startswith(f"{server}/?"), without_cookies)
    requests = record_requests(context)
    page = context.new_page()
    use_playground(page, server, tmp_path)
    assert context.cookies() == []
    secrets = {request.all_headers().get(SESSION_HEADER) for request in requests}
    assert len(secrets) == 1 and None not in secrets  # one per tab, also after a reload
    other = context.new_page()
    open_playground(other, server, "one")
    assert {request.all_headers().get(SESSION_HEADER) for request in requests} != secrets
    assert all(str(secret) not in page.content() for secret in secrets)


def test_the_playground_works_in_a_frame_on_another_site(context: BrowserContext, server: str, tmp_path: Path) -> None:
    """The browser sends no ordinary cookie there, and pages must not read their storage."""
    requests = record_requests(context)
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    with other_site(server) as address:
        use_playground(page, address, tmp_path)
    assert requests and errors == []
    headers = [request.all_headers() for request in requests]
    assert all("cookie" not in each and each[SESSION_HEADER] for each in headers)


def test_an_ordinary_browser_has_a_cookie_that_scripts_cannot_read(context: BrowserContext, server: str) -> None:
    page = context.new_page()
    open_playground(page, server, "one")
    [cookie] = [cookie for cookie in context.cookies() if cookie.get("name") == SESSION_COOKIE]
    assert cookie.get("httpOnly") and cookie.get("sameSite") == "Lax" and not cookie.get("secure")
    assert SESSION_COOKIE not in page.evaluate("document.cookie")


def test_another_sites_page_can_start_nothing(context: BrowserContext, server: str) -> None:
    """The page of the other site knows the address and sends the request itself; the browser adds its origin."""
    page = context.new_page()
    open_playground(page, server, "one")
    with other_site(server) as address:
        page.goto(address)
        requests = {
            "fetch": f"fetch('{server}/gradio_api/queue/join', {{method: 'POST', mode: 'no-cors', body: '{{}}',"
            " credentials: 'include'}).then(() => null)",
            "read": f"fetch('{server}/v1/usage').then(response => response.text(), () => null)",
        }
        refused: list[int] = []
        context.on("response", lambda response: refused.append(response.status) if "join" in response.url else None)
        assert page.evaluate(requests["fetch"]) is None
        assert page.evaluate(requests["read"]) is None
        page.wait_for_timeout(100)
    assert 403 in refused
