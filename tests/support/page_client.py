"""A browser without a window: calls the page's handlers over plain HTTP, with cookies that tests control."""

from __future__ import annotations

import html
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from access.control import SESSION_HEADER

NOT_ALLOWED = "Not allowed"  # title of the errors of refused handlers
TIMEOUT_SECONDS = 60.0  # generous: the machine may be busy


@dataclass(frozen=True)
class Outcome:
    """What a call of a handler led to.

    Attributes:
        success: Whether it returned.
        data: What it returned, one item per output.
        error: Its error message; "" if the server hides it.
        title: Title of the error.
    """

    success: bool
    data: Any = None
    error: str = ""
    title: str = ""

    @property
    def reached(self) -> bool:
        """Whether the handler was called: it returned or raised a readable error.

        Gradio's own errors, which come before the handler, are hidden or have its default title.
        """
        return self.success or (bool(self.error) and self.title not in ("", "Error"))

    @property
    def refused(self) -> bool:
        """Whether permissions refused the call."""
        return self.title == NOT_ALLOWED

    @classmethod
    def read(cls, success: bool, output: dict[str, Any]) -> Outcome:
        """Read the output of a handler as Gradio sends it."""
        error, title = (html.unescape(output.get(name) or "") for name in ("error", "title"))
        return cls(success, output.get("data"), error, title)


class PageClient:
    """A browser with a jar of cookies of its own and one open page.

    Cookies are handled by hand: the ones of a Space are for https only, and tests reach it without the proxy that adds
    https.
    """

    def __init__(self, address: str, host: str = "", block_cookies: bool = False, page_secret: bool = True) -> None:
        """Create the browser.

        Args:
            address: Address of the server.
            host: Host name in the address bar, which a proxy leads to the server; by default that of the address.
            block_cookies: Whether the browser drops all cookies, as in a frame on another site.
            page_secret: Whether the page sends the header of session.js.
        """
        self.host = host or urlsplit(address).netloc
        self.scheme = "https" if host else "http"
        self.cookies: dict[str, str] = {}
        self.session_hash = secrets.token_hex(6)
        self.page_secret = secrets.token_hex(24) if page_secret else ""
        self._block_cookies = block_cookies
        self.http = httpx.Client(base_url=address, timeout=TIMEOUT_SECONDS)
        self._config: dict[str, Any] | None = None

    def headers(self, headers: dict[str, str] | None = None) -> dict[str, str]:
        """Return the headers that the browser sends, changed by `headers`."""
        own = {"host": self.host, "origin": f"{self.scheme}://{self.host}", "sec-fetch-site": "same-origin"}
        if self.cookies:
            own["cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        if self.page_secret:
            own[SESSION_HEADER] = self.page_secret
        return own | (headers or {})

    def request(self, method: str, path: str, headers: dict[str, str] | None = None, **options: Any) -> httpx.Response:
        """Send a request and keep the cookies of the response."""
        response = self.http.request(method, path, headers=self.headers(headers), **options)
        self._keep_cookies(response)
        return response

    @contextmanager
    def stream(self, method: str, path: str, **options: Any) -> Iterator[httpx.Response]:
        """Send a request without reading the body of the response."""
        with self.http.stream(method, path, headers=self.headers(), **options) as response:
            yield response

    def open(self, path: str = "/") -> httpx.Response:
        """Open the page as if its address had been entered."""
        return self.navigate(path)

    def sign_in(self, account: str) -> None:
        """Sign in with the simulated OpenID provider, following the redirects as a browser does."""
        response = self.navigate("/login/huggingface?_target_url=/")
        authorize = response.headers["location"]
        callback = httpx.get(f"{authorize}&account={account}").headers["location"]
        parts = urlsplit(callback)
        assert parts.netloc == self.host, callback
        response = self.navigate(f"{parts.path}?{parts.query}")
        assert response.headers["location"].startswith("/?") or response.headers["location"] == "/", response.text

    # ── Handlers ────────────────────────────────────────────────────────────────────────────────────────────────────

    def config(self) -> dict[str, Any]:
        """Return the description of the page."""
        if self._config is None:
            self._config = self.request("GET", "/config").json()
        return self._config

    def default_inputs(self, number: int) -> list[Any]:
        """Return the values that the inputs of a handler have when the page opens."""
        components = {component["id"]: component for component in self.config()["components"]}
        dependency = next(dependency for dependency in self.config()["dependencies"] if dependency["id"] == number)
        inputs = [components[identifier] for identifier in dependency["inputs"]]
        return [None if item["type"] == "state" else item["props"].get("value") for item in inputs]

    def inputs(self, number: int, **values: Any) -> list[Any]:
        """Return the default inputs of a handler, with other values for components by the id of their element."""
        components = {component["id"]: component["props"].get("elem_id") for component in self.config()["components"]}
        dependency = next(dependency for dependency in self.config()["dependencies"] if dependency["id"] == number)
        names = [(components[identifier] or "").replace("-", "_") for identifier in dependency["inputs"]]
        assert set(values) <= set(names), set(values) - set(names)
        return [values.get(name, default) for name, default in zip(names, self.default_inputs(number), strict=True)]

    def upload(self, name: str, content: bytes) -> dict[str, Any]:
        """Upload a file and return it as the value of a file input."""
        response = self.request("POST", "/gradio_api/upload", files={"files": (name, content)})
        assert response.status_code == 200, response.text
        [path] = response.json()
        return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def join(self, number: int, data: list[Any], event_data: Any = None, session_hash: str = "") -> httpx.Response:
        """Queue a call of a handler by number, in this page's session or another."""
        body = {
            "fn_index": number,
            "data": data,
            "event_data": event_data,
            "session_hash": session_hash or self.session_hash,
        }
        return self.request("POST", "/gradio_api/queue/join", json=body)

    def messages(self, session_hash: str = "") -> Iterator[dict[str, Any]]:
        """Yield the messages of a session's queued calls until all calls have ended."""
        query = {"session_hash": session_hash or self.session_hash}
        with self.stream("GET", "/gradio_api/queue/data", params=query) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line[6:])

    def call(
        self, number: int, data: list[Any] | None = None, event_data: Any = None, session_hash: str = ""
    ) -> Outcome:
        """Call a handler by number through the queue and wait for its end."""
        data = self.default_inputs(number) if data is None else data
        return self.call_all([(number, data, event_data)], session_hash)[0]

    def call_all(self, calls: list[tuple[int, list[Any], Any]], session_hash: str = "") -> list[Outcome]:
        """Call several handlers at once and wait for their ends."""
        identifiers = []
        for number, data, event_data in calls:
            response = self.join(number, data, event_data, session_hash)
            assert response.status_code == 200, (number, response.text)
            identifiers.append(response.json()["event_id"])
        outcomes: dict[str, Outcome] = {}
        for message in self.messages(session_hash):
            if message["msg"] == "process_completed" and message["event_id"] in identifiers:
                outcomes[message["event_id"]] = Outcome.read(message["success"], message["output"])
        return [outcomes[identifier] for identifier in identifiers]

    def run(self, number: int, data: list[Any], event_data: Any = None, session_hash: str = "") -> Outcome:
        """Call a handler by number without the queue. A Space refuses this for handlers that are queued (404)."""
        body = {
            "fn_index": number,
            "data": data,
            "event_data": event_data,
            "session_hash": session_hash or self.session_hash,
        }
        response = self.request("POST", "/gradio_api/run/predict", json=body)
        return Outcome.read(response.status_code == 200, response.json())

    def navigate(self, path: str) -> httpx.Response:
        """Open an address without following redirects, as a click on a link does."""
        headers = {name: value for name, value in self.headers().items() if name not in ("origin", SESSION_HEADER)}
        response = self.http.get(path, headers=headers | {"sec-fetch-mode": "navigate"})
        self._keep_cookies(response)
        return response

    def _keep_cookies(self, response: httpx.Response) -> None:
        if self._block_cookies:
            return
        for header in response.headers.get_list("set-cookie"):
            name, _, value = header.partition(";")[0].partition("=")
            if value in ("", "null"):
                self.cookies.pop(name, None)
            else:
                self.cookies[name] = value
