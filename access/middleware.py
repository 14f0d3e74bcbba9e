"""ASGI middleware in front of the whole server: permissions of routes, sessions bound to browsers, and body limits."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, urlencode
from uuid import uuid4

import anyio
import orjson
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from access.control import (
    ADMIN_COOKIE,
    SECRET_LENGTH,
    SESSION_COOKIE,
    AccessControl,
    bind_session,
    browser_secret,
    is_same_origin,
)
from access.permissions import RouteAccess, RouteRule, find_route
from access.roles import Role

COOKIE_SECONDS = 30 * 24 * 3600
LARGE_BODY = 2**20  # bytes; larger JSON is parsed in a thread, because parsing blocks the event loop
MAX_LARGE_BODY_VALUES = 100_000  # in large JSON: few long strings, such as photos, are cheap to parse again in Gradio
BODY_SECONDS = 120.0  # maximum time to receive a body
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
FOREIGN_ORIGIN = "Requests from other sites are refused. Open the page itself."
NOT_FOUND = "There is no such page."
USAGE_ONLY = (
    "Usage is for administrators of this deployment. Sign in as one, or send an API key or, for Prometheus, the "
    "metrics token in the header Authorization: Bearer …"
)
LENGTH_REQUIRED = "Send uploads with the header Content-Length and without Transfer-Encoding."
WRONG_LINK = "This administrator link was used already or is wrong. The server prints a new one when a link is used."


class AccessMiddleware:
    """Checks every request before the application sees it.

    - Routes that `ROUTES` does not list, or lists as closed, do not exist.
    - Requests that change something are refused if another site's page sends them.
    - A browser gets a random secret as an http-only cookie, and Gradio's session hash is replaced by one that only this
      browser can produce; see `bind_session`.
    - Bodies are limited before they are parsed.
    """

    def __init__(
        self,
        app: ASGIApp,
        access: AccessControl,
        is_metrics_token: Callable[[HTTPConnection], bool] = lambda connection: False,
        admit_upload: Callable[[str, int], str | None] = lambda visitor, size: None,
        print_link: Callable[[], None] = lambda: None,
    ) -> None:
        """Wrap an application.

        Args:
            app: The ASGI application.
            access: Determines the visitor.
            is_metrics_token: Whether a request has the token that may only read usage and metrics.
            admit_upload: Returns why an upload of a visitor (by hash) and size in bytes is refused, or None. It may
                delete older uploads and runs in a thread.
            print_link: Prints the new administrator link after one was used.
        """
        self.app, self.access, self._print_link = app, access, print_link
        self._is_metrics_token, self._admit_upload = is_metrics_token, admit_upload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] == "websocket":  # not used by this application
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        rule = find_route("POST" if scope["method"] == "OPTIONS" else scope["method"], scope["path"])
        refusal = self._refusal(connection, rule)
        if refusal is not None or rule is None:
            await (refusal or _error(404, NOT_FOUND))(scope, receive, send)
            return
        if rule.path == "/admin":
            await self._redeem_link(connection)(scope, receive, send)
            return
        if rule.path == "/gradio_api/upload":
            if "transfer-encoding" in connection.headers or "content-length" not in connection.headers:
                await _error(411, LENGTH_REQUIRED)(scope, receive, send)  # the quota counts it before the body arrives
                return
            visitor = self.access.visitor(connection).hash
            reason = await anyio.to_thread.run_sync(self._admit_upload, visitor, _content_length(connection))
            if reason:
                await _error(429, reason)(scope, receive, send)
                return
        if rule.max_body is not None:
            receive = _LimitedReceive(receive, rule.max_body)
        try:
            scope, receive = await self._bind_session(scope, receive, connection, rule)
        except _BodyError as error:
            await _error(error.status_code, error.detail)(scope, receive, send)
            return
        if rule.path == "/" and len(connection.cookies.get(SESSION_COOKIE, "")) not in SECRET_LENGTH:
            send = _with_header(send, "set-cookie", self._cookie(SESSION_COOKIE, secrets.token_urlsafe(32), connection))
        await self.app(scope, receive, send)

    def _refusal(self, connection: HTTPConnection, rule: RouteRule | None) -> Response | None:
        """Return the response that refuses a request, or None."""
        if rule is None or rule.access == RouteAccess.CLOSED:
            return _error(404, NOT_FOUND)
        method = connection.scope["method"]
        has_key = rule.access == RouteAccess.API_KEY and (
            "x-moondream-auth" in connection.headers or "authorization" in connection.headers
        )
        if method not in SAFE_METHODS and not is_same_origin(connection) and not has_key:
            error = _api_error if rule.access == RouteAccess.API_KEY else _error
            return error(403, FOREIGN_ORIGIN)
        if rule.access == RouteAccess.USAGE and not self._may_read_usage(connection):
            return _error(401, USAGE_ONLY)
        if rule.max_body is not None and _content_length(connection) > rule.max_body:
            return _error(413, f"The request is larger than {rule.max_body / 2**20:g} MB.")
        return None

    def _may_read_usage(self, connection: HTTPConnection) -> bool:
        visitor = self.access.visitor(connection)
        return visitor.role == Role.ADMIN or visitor.id.startswith("key:") or self._is_metrics_token(connection)

    def _redeem_link(self, connection: HTTPConnection) -> Response:
        cookie = self.access.link.redeem(connection.query_params.get("token", ""))
        if cookie is None:
            return _error(403, WRONG_LINK)
        response = RedirectResponse("/", 303, {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"})
        response.headers["set-cookie"] = self._cookie(ADMIN_COOKIE, cookie, connection)
        self._print_link()
        return response

    def _cookie(self, name: str, value: str, connection: HTTPConnection) -> str:
        """Return a Set-Cookie header. A Space is shown in a frame on another site, which needs a partitioned cookie."""
        header = f"{name}={value}; Path=/; Max-Age={COOKIE_SECONDS}; HttpOnly"
        if self.access.mode == "space":
            return f"{header}; SameSite=None; Secure; Partitioned"
        secure = "; Secure" if connection.url.scheme == "https" else ""
        return f"{header}; SameSite=Lax{secure}"

    async def _bind_session(
        self, scope: Scope, receive: Receive, connection: HTTPConnection, rule: RouteRule
    ) -> tuple[Scope, Receive]:
        """Replace the session hash in a request by the one that is bound to its browser."""
        if not rule.session:
            return scope, receive
        secret = browser_secret(connection)
        if rule.session == "path":
            head, _, session_hash = scope["path"].rstrip("/").rpartition("/")
            path = f"{head}/{bind_session(secret, session_hash)}"
            return {**scope, "path": path, "raw_path": path.encode()}, receive
        if rule.session == "query":
            query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
            bound = [(k, bind_session(secret, v) if k == "session_hash" else v) for k, v in query]
            return {**scope, "query_string": urlencode(bound).encode()}, receive
        body = await _read_body(receive)
        if len(body) > LARGE_BODY:
            body = await anyio.to_thread.run_sync(_bind_large_body, body, secret)
        else:
            body = _bind_body(body, secret)
        headers = [(k, v) for k, v in scope["headers"] if k != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        return {**scope, "headers": headers}, _Replay(body, receive)


def _bind_large_body(body: bytes, secret: str) -> bytes:
    """Do the same for a large body. Raises _BodyError if it holds too many values."""
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_LARGE_BODY_VALUES:
        raise _BodyError(413, "The request holds too many values.")
    return _bind_body(body, secret)


def _bind_body(body: bytes, secret: str) -> bytes:
    """Return a JSON body with its session hash bound to a browser. Invalid bodies are left to the application."""
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        return b"{}"
    if not isinstance(content, dict):
        return b"{}"
    if isinstance(content.get("session_hash"), str):
        content["session_hash"] = bind_session(secret, content["session_hash"])
    return orjson.dumps(content)


class _BodyError(HTTPException):
    """Raised when a body is too large or too slow. The application answers with its status if it reads the body."""


async def _read_body(receive: Receive) -> bytes:
    chunks = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _BodyError(400, "The client left before its request was complete.")
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks)


class _LimitedReceive:
    """ASGI `receive` that limits the size of a body and the time to receive it."""

    def __init__(self, receive: Receive, max_body: int) -> None:
        self._receive, self._max_body, self._remaining = receive, max_body, max_body
        self._deadline = time.monotonic() + BODY_SECONDS
        self._complete = False

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.01, self._deadline - time.monotonic()))
        except asyncio.TimeoutError:
            raise _BodyError(408, "The request did not arrive in time. Send it again.") from None
        self._remaining -= len(message.get("body", b""))
        if self._remaining < 0:
            raise _BodyError(413, f"The request is larger than {self._max_body / 2**20:g} MB.")
        self._complete = not message.get("more_body", False)
        return message


class _Replay:
    """ASGI `receive` that returns a body that was read already, and then the original messages."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._message: Message | None = {"type": "http.request", "body": body, "more_body": False}
        self._receive = receive

    async def __call__(self) -> Message:
        message, self._message = self._message, None
        return message if message is not None else await self._receive()


def _with_header(send: Send, name: str, value: str) -> Send:
    """Add a header to the response."""

    async def send_with_header(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], (name.encode(), value.encode())]}
        await send(message)

    return send_with_header


def _content_length(connection: HTTPConnection) -> int:
    length: Any = connection.headers.get("content-length", "0")
    return int(length[:20]) if length.isascii() and length.isdigit() else 0


def _error(status: int, message: str) -> Response:
    """Return an error as JSON, in the form that Gradio's page displays."""
    return JSONResponse({"detail": message, "error": message}, status, {"Cache-Control": "no-store"})


def _api_error(status: int, message: str) -> Response:
    """Return an error in the form of the /v1 API, an `ErrorResponse`."""
    request_id = uuid4().hex
    error = {"type": "forbidden", "message": message, "request_id": request_id}
    return JSONResponse({"error": error}, status, {"X-Request-Id": request_id})
