"""Tests of the middleware in front of the server: closed routes, foreign origins, cookies, sessions, body limits."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.testclient import TestClient
from starlette.types import Message
from starlette.websockets import WebSocketDisconnect

from access import middleware, permissions
from access.control import ADMIN_COOKIE, SECRET_LENGTH, SESSION_COOKIE, SESSION_HEADER, AccessControl, bind_session
from access.middleware import AccessMiddleware
from access.permissions import ROUTES, RouteAccess, RouteRule

HOST = "http://playground.example"
FOREIGN = {"origin": "https://evil.example"}
SECRET, OTHER_SECRET = "s" * 43, "t" * 43
USAGE_TOKEN = {"authorization": "Bearer metrics"}


async def echo(request: Request) -> JSONResponse:
    """Return what the application sees of a request."""
    body = await request.body()
    return JSONResponse(
        {"path": request.url.path, "query": dict(request.query_params), "body": body.decode(), "method": request.method}
    )


def application(access: AccessControl | None = None, **options: Any) -> AccessMiddleware:
    app = Starlette()
    app.add_route("/{path:path}", echo, methods=["GET", "POST", "PUT", "DELETE", "OPTIONS"])
    return AccessMiddleware(app, access or AccessControl("link"), **options)


def client(access: AccessControl | None = None, base: str = HOST, **options: Any) -> TestClient:
    return TestClient(application(access, **options), base_url=base, follow_redirects=False)


def as_browser(http: TestClient, secret: str, **more: str) -> TestClient:
    """Give a client a browser's cookies; unlike a browser it sends them over http as well."""
    http.headers["cookie"] = "; ".join(f"{k}={v}" for k, v in {SESSION_COOKIE: secret, **more}.items())
    return http


def attributes(set_cookie: str) -> tuple[str, str, set[str]]:
    """Return name, value and attributes of a Set-Cookie header."""
    first, *rest = set_cookie.split("; ")
    name, _, value = first.partition("=")
    return name, value, set(rest)


# ── Routes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/unknown"),
        ("GET", "/gradio_api/unknown"),
        ("DELETE", "/gradio_api/queue/join"),
        ("GET", "/gradio_api/queue/join"),
        ("GET", "//gradio_api/queue/data"),
        ("GET", "/gradio_api/../unknown"),
        ("OPTIONS", "/unknown"),
        *((rule.methods[0], permissions._example(rule.path)) for rule in ROUTES if rule.access == RouteAccess.CLOSED),
    ],
)
def test_unlisted_and_closed_routes_do_not_exist(method: str, path: str) -> None:
    response = client().request(method, HOST + path)
    assert response.status_code == 404 and response.json()["error"] == middleware.NOT_FOUND


def test_a_slash_at_the_end_does_not_avoid_a_rule() -> None:
    http = client()
    assert http.get("/metrics/").status_code == 401
    assert http.get("/v1/usage.csv/").status_code == 401
    assert http.get("/gradio_api/token/").status_code == 404
    data = as_browser(http, SECRET).get("/gradio_api/queue/data/?session_hash=abc").json()
    assert data["query"] == {"session_hash": bind_session(SECRET, "abc")}


def test_encoded_paths_do_not_avoid_a_rule() -> None:
    http = client()
    assert http.get("/%6detrics").status_code == 401
    assert http.get("/v1/usage%2Ecsv").status_code == 401
    assert http.get("/gradio_api/%74oken").status_code == 404


def test_websockets_are_refused() -> None:
    with pytest.raises(WebSocketDisconnect) as closed, client().websocket_connect("/"):
        pass
    assert closed.value.code == 1008


# ── Other sites ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "headers",
    [
        FOREIGN,
        {"origin": "null"},
        {"origin": "http://playground.example.evil.example"},
        {"origin": "http://playground.example:8080"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
@pytest.mark.parametrize("path", [permissions._example(rule.path) for rule in ROUTES if "POST" in rule.methods])
def test_other_sites_change_nothing(path: str, headers: dict[str, str]) -> None:
    response = as_browser(client(), SECRET).post(path, json={}, headers=headers)
    assert response.status_code in (403, 404)
    error = response.json()["error"]
    message = error["message"] if path.startswith("/v1") else error
    assert message in (middleware.FOREIGN_ORIGIN, middleware.NOT_FOUND)


def test_the_page_itself_and_programs_may_change_something() -> None:
    http = client()
    assert http.post("/gradio_api/cancel", json={}, headers={"origin": HOST}).status_code == 200
    assert http.post("/gradio_api/cancel", json={}).status_code == 200


def test_a_program_on_another_site_may_use_the_api_with_a_key() -> None:
    """A browser sends such a header to another site only after the server has agreed, and never by itself."""
    http = client()
    assert http.post("/v1/query", json={}, headers=FOREIGN).status_code == 403
    assert http.post("/v1/query", json={}, headers={**FOREIGN, "x-moondream-auth": "key"}).status_code == 200
    assert http.post("/gradio_api/cancel", json={}, headers={**FOREIGN, "x-moondream-auth": "key"}).status_code == 403


# ── Usage ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", ["/metrics", "/v1/usage", "/v1/usage.csv", "/v1/usage.parquet"])
def test_usage_is_for_administrators_keys_and_the_metrics_token(path: str) -> None:
    access = AccessControl("link", tenant_of=lambda connection: connection.headers.get("x-moondream-auth"))
    http = client(
        access, is_metrics_token=lambda connection: connection.headers.get("authorization") == "Bearer metrics"
    )
    assert http.get(path).status_code == 401
    assert http.get(path, headers={"authorization": "Bearer other"}).status_code == 401
    assert http.get(path, headers=USAGE_TOKEN).status_code == 200
    assert http.get(path, headers={"x-moondream-auth": "key"}).status_code == 200
    cookie = access.link.redeem(access.link.token) or ""
    assert http.get(path, headers={"cookie": f"{ADMIN_COOKIE}={cookie}"}).status_code == 200
    assert http.get(path, headers={"cookie": f"{ADMIN_COOKIE}={cookie}", **FOREIGN}).status_code == 401


def test_usage_is_open_on_localhost() -> None:
    local = TestClient(application(AccessControl()), base_url="http://localhost:7860", client=("127.0.0.1", 5000))
    assert local.get("/metrics").status_code == 200
    assert local.get("/metrics", headers={"host": "evil.example"}).status_code == 401
    remote = TestClient(application(AccessControl()), base_url="http://localhost:7860", client=("192.168.1.9", 5000))
    assert remote.get("/metrics").status_code == 401


def test_the_metrics_token_is_for_nothing_else() -> None:
    http = client(is_metrics_token=lambda connection: True)
    assert http.post("/gradio_api/cancel", json={}, headers=USAGE_TOKEN | FOREIGN).status_code == 403


# ── Administrator link ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_link_gives_a_cookie_once_and_prints_the_next_link() -> None:
    access, printed = AccessControl("link"), []
    http = client(access, print_link=lambda: printed.append(access.link.token))
    token = access.link.token
    assert http.get("/admin", params={"token": "wrong"}).status_code == 403
    assert http.get("/admin").status_code == 403
    assert printed == []
    response = http.get("/admin", params={"token": token})
    assert (response.status_code, response.headers["location"]) == (303, "/")
    assert response.headers["cache-control"] == "no-store" and response.headers["referrer-policy"] == "no-referrer"
    name, value, flags = attributes(response.headers["set-cookie"])
    assert name == ADMIN_COOKIE and access.link.accepts(value) and {"HttpOnly", "SameSite=Lax"} <= flags
    assert printed == [access.link.token] and access.link.token != token
    again = http.get("/admin", params={"token": token})
    assert (again.status_code, again.json()["error"]) == (403, middleware.WRONG_LINK)
    assert "set-cookie" not in again.headers and token not in again.text
    assert http.post("/admin", params={"token": access.link.token}).status_code == 404
    assert http.head("/admin", params={"token": access.link.token}).status_code == 404
    assert len(printed) == 1


# ── Cookies ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("mode", "base", "flags"),
    [
        ("local", "http://localhost:7860", {"SameSite=Lax"}),
        ("link", "http://192.168.1.2:7860", {"SameSite=Lax"}),
        ("link", "https://playground.example", {"SameSite=Lax", "Secure"}),
        ("space", "http://acme-playground.hf.space", {"SameSite=None", "Secure", "Partitioned"}),
        ("space", "https://acme-playground.hf.space", {"SameSite=None", "Secure", "Partitioned"}),
    ],
)
def test_flags_of_the_session_cookie(mode: Any, base: str, flags: set[str]) -> None:
    response = client(AccessControl(mode), base).get("/")
    name, value, actual = attributes(response.headers["set-cookie"])
    assert name == SESSION_COOKIE and len(value) in SECRET_LENGTH
    assert actual == {"Path=/", f"Max-Age={middleware.COOKIE_SECONDS}", "HttpOnly", *flags}


def test_each_browser_gets_its_own_secret_and_keeps_it() -> None:
    secrets = {attributes(client().get("/").headers["set-cookie"])[1] for _ in range(5)}
    assert len(secrets) == 5
    assert "set-cookie" not in as_browser(client(), SECRET).get("/").headers
    assert "set-cookie" in as_browser(client(), "too-short").get("/").headers
    assert "set-cookie" not in client().get("/config").headers


# ── Sessions ────────────────────────────────────────────────────────────────────────────────────────────────────────

BODY_ROUTES = [permissions._example(rule.path) for rule in ROUTES if rule.session == "body"]


@pytest.mark.parametrize("path", BODY_ROUTES)
def test_the_session_in_a_body_is_bound_to_the_browser(path: str) -> None:
    body = {"session_hash": "abc", "data": ["session_hash", {"session_hash": "abc"}], "fn_index": 3}
    seen = [
        orjson.loads(as_browser(client(), secret).post(path, json=body).json()["body"])
        for secret in (SECRET, OTHER_SECRET)
    ]
    assert [each["session_hash"] for each in seen] == [bind_session(SECRET, "abc"), bind_session(OTHER_SECRET, "abc")]
    assert all(each | {"session_hash": "abc"} == body for each in seen)


def test_the_session_in_a_query_or_path_is_bound_to_the_browser() -> None:
    http, bound = as_browser(client(), SECRET), bind_session(SECRET, "a b")
    seen = http.get("/gradio_api/queue/data?x=1&session_hash=a%20b&session_hash=c&y=%26").json()
    assert seen["query"] == {"x": "1", "session_hash": bind_session(SECRET, "c"), "y": "&"}
    assert http.get("/gradio_api/heartbeat/a%20b").json()["path"] == f"/gradio_api/heartbeat/{bound}"
    assert http.get("/gradio_api/heartbeat/a%20b/").json()["path"] == f"/gradio_api/heartbeat/{bound}"


def test_the_page_sends_the_secret_where_cookies_are_blocked() -> None:
    body = {"session_hash": "abc"}
    seen = client().post("/gradio_api/queue/join", json=body, headers={SESSION_HEADER: SECRET}).json()["body"]
    assert orjson.loads(seen)["session_hash"] == bind_session(SECRET, "abc")


def test_requests_of_other_sites_are_bound_to_no_browser() -> None:
    http = as_browser(client(), SECRET)
    for headers in (FOREIGN, {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}):
        seen = http.get("/gradio_api/queue/data?session_hash=abc", headers=headers).json()
        assert seen["query"]["session_hash"] == bind_session("", "abc")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"session_hash"', b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_object_reaches_the_application_as_an_empty_one(content: bytes) -> None:
    response = client().post("/gradio_api/queue/join", content=content)
    assert response.json()["body"] == "{}"


@pytest.mark.parametrize("value", [None, 1, ["abc"], {"session_hash": "abc"}])
def test_a_session_that_is_no_text_is_left_to_the_application(value: Any) -> None:
    seen = as_browser(client(), SECRET).post("/gradio_api/queue/join", json={"session_hash": value}).json()["body"]
    assert orjson.loads(seen) == {"session_hash": value}


def test_a_name_that_occurs_twice_is_bound_as_well() -> None:
    content = b'{"session_hash": "first", "session_hash": "abc"}'
    seen = as_browser(client(), SECRET).post("/gradio_api/queue/join", content=content).json()["body"]
    assert seen == orjson.dumps({"session_hash": bind_session(SECRET, "abc")}).decode()


def test_large_json_of_many_values_is_refused() -> None:
    photo = json.dumps({"session_hash": "h", "data": ["x" * 2**21]}).encode()
    values = json.dumps({"session_hash": "h", "data": [1] * 2**20}).encode()
    http = client()
    assert http.post("/gradio_api/queue/join", content=photo).status_code == 200
    refused = http.post("/gradio_api/queue/join", content=values)
    assert refused.status_code == 413 and "too many values" in refused.json()["detail"]


@pytest.mark.parametrize(("size", "in_thread"), [(100, False), (2**20 - 100, False), (2**20 + 100, True)])
def test_large_json_is_parsed_in_a_thread(size: int, in_thread: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    parsers: list[int] = []
    bind_body = middleware._bind_body

    def observed(body: bytes, secret: str) -> bytes:
        parsers.append(threading.get_ident())
        return bind_body(body, secret)

    monkeypatch.setattr(middleware, "_bind_body", observed)
    content = json.dumps({"session_hash": "abc", "data": ["x" * size]}).encode()
    [message, *_], loop_thread = call(content_of(content), "/gradio_api/queue/join")
    assert message["status"] == 200
    assert [parser != loop_thread for parser in parsers] == [in_thread]


# ── Bodies ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def content_of(*chunks: bytes) -> Iterator[Message]:
    """Return ASGI messages of a body without Content-Length, as of chunked transfer encoding."""
    for index, chunk in enumerate(chunks, 1):
        yield {"type": "http.request", "body": chunk, "more_body": index < len(chunks)}


def call(messages: Iterator[Message], path: str) -> tuple[list[Message], int]:
    """Send a POST request; a body that ends early never continues. Return the response's messages and the thread."""
    sent: list[Message] = []

    async def receive() -> Message:
        message = next(messages, None)
        return message if message is not None else await asyncio.Future()

    async def send(message: Message) -> None:
        sent.append(message)

    async def run() -> int:
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [(b"host", b"x")],
            "client": ("10.0.0.1", 1),
            "server": ("x", 80),
            "scheme": "http",
        }
        await application()(scope, receive, send)
        return threading.get_ident()

    thread = asyncio.run(run())
    return sent, thread


@pytest.mark.parametrize("path", ["/gradio_api/cancel", "/gradio_api/queue/join", "/gradio_api/upload"])
def test_a_body_that_announces_too_much_is_refused_unread(path: str) -> None:
    rule = permissions.find_route("POST", path)
    assert rule is not None and rule.max_body is not None
    response = client().post(path, headers={"content-length": str(rule.max_body + 1)}, content=b"")
    assert response.status_code == 413 and "larger than" in response.json()["error"]


def test_a_chunked_body_is_refused_when_it_exceeds_the_limit() -> None:
    rule = permissions.find_route("POST", "/gradio_api/cancel")
    assert rule is not None and rule.max_body is not None
    read = 0

    def endless() -> Iterator[Message]:
        nonlocal read
        while True:
            read += 1024
            yield {"type": "http.request", "body": b"x" * 1024, "more_body": True}

    [start, *_], _ = call(endless(), "/gradio_api/cancel")
    assert start["status"] == 413
    assert read <= rule.max_body + 1024


def test_a_chunked_body_that_the_application_reads_itself_is_limited_too(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = RouteRule(("POST",), "/gradio_api/call/{api_name}", max_body=5000)
    monkeypatch.setattr(permissions, "ROUTES", (rule,))
    [start, *_], _ = call(content_of(b"x" * 3000, b"x" * 3000), "/gradio_api/call/x")
    assert start["status"] == 413
    [start, *_], _ = call(content_of(b"x" * 2000, b"x" * 2000), "/gradio_api/call/x")
    assert start["status"] == 200


@pytest.mark.parametrize("length", [{}, {"content-length": "1"}])
def test_an_upload_of_unknown_size_is_refused(length: dict[str, str]) -> None:
    """It would not count against the quota."""
    admitted: list[int] = []
    http = client(admit_upload=lambda visitor, size: admitted.append(size))
    headers = {"transfer-encoding": "chunked", **length}
    response = http.post("/gradio_api/upload", content=iter([b"x" * 3000]), headers=headers)
    assert response.status_code == 411 and response.json()["error"] == middleware.LENGTH_REQUIRED
    assert admitted == []
    [start, *_], _ = call(content_of(b"x"), "/gradio_api/upload")
    assert start["status"] == 411


def test_a_body_that_does_not_arrive_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.0)
    started = iter([{"type": "http.request", "body": b"{", "more_body": True}])
    [start, body], _ = call(started, "/gradio_api/queue/join")
    assert start["status"] == 408 and b"did not arrive in time" in body["body"]


def test_a_client_that_leaves_while_it_sends_is_not_answered_by_the_application() -> None:
    left: Iterator[Message] = iter(
        [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    )
    [start, *_], _ = call(left, "/gradio_api/queue/join")
    assert start["status"] == 400


def test_an_upload_beyond_the_quota_is_refused_with_the_reason() -> None:
    seen: list[tuple[str, int]] = []

    def admit(visitor: str, size: int) -> str | None:
        seen.append((visitor, size))
        return "Your uploads are full." if size > 10 else None

    access = AccessControl("link")
    http = as_browser(client(access, admit_upload=admit), SECRET)
    assert http.post("/gradio_api/upload", content=b"x" * 10).status_code == 200
    response = http.post("/gradio_api/upload", content=b"x" * 11)
    assert (response.status_code, response.json()["error"]) == (429, "Your uploads are full.")
    scope = {"type": "http", "client": None, "headers": [(b"cookie", f"{SESSION_COOKIE}={SECRET}".encode())]}
    assert seen == [(access.visitor(HTTPConnection(scope)).hash, size) for size in (10, 11)]
