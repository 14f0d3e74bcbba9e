"""What every request to the API passes first: it gets an id, its key is checked, and its body is limited."""

from __future__ import annotations

import asyncio
import time
from uuid import uuid4

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.auth import ApiKeyAuth
from serving.errors import ApiError, answer

MAX_BODY = 16 * 2**20
MAX_STEP = 128 * 2**20  # of a training step, in which every group has its photo
BODY_SECONDS = 60.0


class RequestGuard:
    """ASGI middleware. Sets `state.request_id` and `state.tenant`; answers what may not pass."""

    def __init__(
        self, app: ASGIApp, keys: ApiKeyAuth, max_body: int = MAX_BODY, body_seconds: float = BODY_SECONDS
    ) -> None:
        self.app, self.keys, self.max_body, self.body_seconds = app, keys, max_body, body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        connection.state.request_id = uuid4().hex
        try:
            connection.state.tenant = self.keys.tenant(connection)
            most = MAX_STEP if scope["path"].endswith("/tuning/train_step") else self.max_body
            _check_length(connection, most)
        except ApiError as error:
            await answer(error, connection.state.request_id)(scope, receive, send)
            return
        await self.app(scope, _Limited(receive, most, self.body_seconds), send)


def _check_length(connection: HTTPConnection, most: int) -> None:
    length = connection.headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit() or int(length[:20]) > most:
        raise too_large(most)


def too_large(most: int) -> ApiError:
    """What a body over the limit is answered."""
    return ApiError(413, f"The request is over {most // 2**20} MB. Send a smaller photo.")


class _Limited:
    """Receives a body of at most so many bytes in at most so many seconds."""

    def __init__(self, receive: Receive, most: int, seconds: float) -> None:
        self.receive, self.left, self.most = receive, most, most
        self.end = time.monotonic() + seconds
        self.complete = False

    async def __call__(self) -> Message:
        if self.complete:
            return await self.receive()
        try:
            message = await asyncio.wait_for(self.receive(), max(0.01, self.end - time.monotonic()))
        except asyncio.TimeoutError:
            raise ApiError(408, "The request did not arrive in time. Send it again.") from None
        self.left -= len(message.get("body", b""))
        if self.left < 0:
            raise too_large(self.most)
        self.complete = not message.get("more_body", False)
        return message
