"""ASGI middleware of the /v1 API: request ids, API keys, and limits on body size and upload time."""

from __future__ import annotations

import asyncio
import re
import time
from uuid import uuid4

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.auth import ApiKeyAuth
from serving.errors import ApiError, error_response

MAX_BODY = 16 * 2**20  # bytes
MAX_PART_BODY = 100 * 2**20  # bytes of a part of a batch
PART_SECONDS = 600.0
MAX_TRAIN_STEP_BODY = 128 * 2**20  # bytes; each group of a training step contains its photo
BODY_SECONDS = 60.0
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")  # any other X-Request-Id of a client is replaced by a new one


class RequestGuard:
    """Authenticates requests and limits their bodies. Sets `state.request_id` and `state.tenant`."""

    def __init__(
        self, app: ASGIApp, auth: ApiKeyAuth, max_body: int = MAX_BODY, body_seconds: float = BODY_SECONDS
    ) -> None:
        """Wrap an application.

        Args:
            app: The ASGI application.
            auth: Authenticates requests.
            max_body: Maximum size of a body in bytes, except for training steps and parts of batches.
            body_seconds: Maximum time to receive a body, except for parts of batches.
        """
        self.app, self.auth, self.max_body, self.body_seconds = app, auth, max_body, body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        sent_id = connection.headers.get("x-request-id", "")
        connection.state.request_id = sent_id if REQUEST_ID.fullmatch(sent_id) else uuid4().hex
        try:
            connection.state.tenant = self.auth.authenticate(connection)
            max_body, seconds = self._limits(scope)
            length = connection.headers.get("content-length", "0")
            if not length.isascii() or not length.isdigit() or int(length[:20]) > max_body:
                raise body_too_large(max_body)
        except ApiError as error:
            await error_response(error, connection.state.request_id, scope["path"])(scope, receive, send)
            return
        await self.app(scope, BodyLimiter(receive, max_body, seconds), send)

    def _limits(self, scope: Scope) -> tuple[int, float]:
        """Return the maximum size of a body in bytes, and the maximum time to receive it in seconds."""
        if scope["path"].endswith("/tuning/train_step"):
            return MAX_TRAIN_STEP_BODY, self.body_seconds
        if scope["method"] == "PUT" and "/batch/" in scope["path"]:
            return MAX_PART_BODY, PART_SECONDS
        return self.max_body, self.body_seconds


def body_too_large(max_body: int) -> ApiError:
    """Return the error for a body of more than `max_body` bytes."""
    return ApiError(413, f"The request is larger than {max_body // 2**20} MB. Send a smaller photo.")


class BodyLimiter:
    """ASGI `receive` that limits the size of a body and the time to receive it."""

    def __init__(self, receive: Receive, max_body: int, seconds: float) -> None:
        self.receive, self.remaining, self.max_body = receive, max_body, max_body
        self.deadline = time.monotonic() + seconds
        self.complete = False

    async def __call__(self) -> Message:
        """Receive the next part of the body. Raises ApiError (408, 413)."""
        if self.complete:
            return await self.receive()
        try:
            message = await asyncio.wait_for(self.receive(), max(0.01, self.deadline - time.monotonic()))
        except asyncio.TimeoutError:
            raise ApiError(408, "The request did not arrive in time. Send it again.") from None
        self.remaining -= len(message.get("body", b""))
        if self.remaining < 0:
            raise body_too_large(self.max_body)
        self.complete = not message.get("more_body", False)
        return message
