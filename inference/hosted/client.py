"""HTTP client for the Moondream API: timeouts, retries, rate limit and readable errors. Never exposes the API key."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any

import httpx
import numpy as np
import tenacity
from pydantic import SecretStr

from inference.types import CLOUD_URL, DEFAULT_RATE, InferenceError, clean
from recipes import jpeg_data_url, shrink

RETRYABLE_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504, *range(520, 525)})
NOT_EXECUTED_STATUSES = frozenset({408, 425, 429, 503})  # nothing was computed, so nothing is charged
MAX_ATTEMPTS = 4
MAX_RETRY_WAIT = 30.0  # seconds; if the server demands a longer wait, the call fails at once
MAX_RESPONSE_BYTES = 32_000_000
MAX_PHOTO_SIDE = 2048  # pixels; Moondream's tiles hold about 1.8 megapixels in total
MAX_PROVIDER_MESSAGE = 300  # characters
USER_AGENT = "moondream-playground"

# Messages by HTTP status; {0} is the host name.
STATUS_MESSAGES = {
    401: "{0} does not accept the key. Check it, or create a new one.",
    402: "The account at {0} has no credit. Add credit, or use another key.",
    403: "The key has no permission for this at {0}, or its account has no credit. Check both there.",
    404: "{0} does not have this model or function. Choose another model.",
    408: "{0} timed out waiting for the request. Try again.",
    410: "{0} no longer has this.",
    413: "The photo is too large for {0}. Use a smaller one.",
    429: "The rate limit of {0} is exceeded. Wait a moment and try again, or request fewer candidates.",
}
SERVER_ERROR_MESSAGE = "{0} has a problem (status {1}). Try again later, or check its status page."
CLIENT_ERROR_MESSAGE = "{0} rejected the request (status {1})."
ERROR_KINDS = {401: "key", 402: "credit", 403: "credit", 404: "unknown_model", 413: "too_large", 429: "busy"}


class CloudError(InferenceError):
    """Raised when a call fails.

    Attributes:
        kind: provider, cancelled, key (401), credit (402, 403), unknown_model (404), too_large (413), busy (429),
            timeout or failed.
        message: Message that tells the user what to do; never contains the key.
        status: HTTP status, or None without a response.
        uncertain: Whether the server may have executed, and charged, the request anyway.
        retry_after: Seconds that the server asks to wait before the next request.
    """

    def __init__(
        self,
        kind: str,
        message: str,
        status: int | None = None,
        uncertain: bool = False,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(kind, message)
        self.status = status
        self.uncertain = uncertain
        self.retry_after = retry_after


@dataclass(frozen=True)
class Timeouts:
    """Timeouts in seconds.

    An attempt that exceeds `attempt` ends when the next chunk arrives, hence at most `read` seconds later.

    Attributes:
        connect: To open the connection.
        read: Between two chunks of a response.
        attempt: For one attempt.
        total: For all attempts of a call.
    """

    connect: float = 10.0
    read: float = 30.0
    attempt: float = 120.0
    total: float = 240.0


@dataclass(frozen=True)
class ApiResponse:
    """The response of a successful call.

    Attributes:
        data: The JSON object.
        request_id: Id assigned by the server.
        seconds: Duration of the last attempt.
        attempts: Number of attempts.
        possible_extra_charges: Number of failed attempts that the server may have executed, and charged, as well.
    """

    data: dict[str, Any]
    request_id: str = ""
    seconds: float = 0.0
    attempts: int = 1
    possible_extra_charges: int = 0


class RateLimiter:
    """Limits all threads together to `rate` requests per second, first come, first served."""

    def __init__(self, rate: float) -> None:
        self._interval = 1 / rate
        self._lock = threading.Lock()
        self._next_slot = 0.0

    def acquire(self, is_cancelled: Callable[[], bool], deadline: float) -> None:
        """Block until a request may be sent.

        Args:
            is_cancelled: Polled while waiting.
            deadline: Latest start of the request, by `time.monotonic()`.

        Raises:
            CloudError: If cancelled, or if the next slot is after the deadline.
        """
        with self._lock:
            slot = max(self._next_slot, time.monotonic())
            if slot > deadline:
                raise CloudError("busy", "Too many requests are already waiting. Try again in a moment.")
            self._next_slot = slot + self._interval
        while True:
            if is_cancelled():
                raise CloudError("cancelled", "Cancelled.")
            remaining = slot - time.monotonic()
            if remaining <= 0:
                return
            time.sleep(min(remaining, 0.1))

    def pause(self, seconds: float) -> None:
        """Block all requests for a number of seconds."""
        with self._lock:
            self._next_slot = max(self._next_slot, time.monotonic() + seconds)


@lru_cache(maxsize=64)
def rate_limiter(url: str, rate: float) -> RateLimiter:
    """Return the rate limiter of a server, shared by all clients of this process."""
    return RateLimiter(rate)


@dataclass(frozen=True)
class RetryPolicy:
    """Retries of one call with exponential backoff, jitter and the server's Retry-After.

    Attributes:
        deadline: Latest start of an attempt, by `time.monotonic()`.
        repeatable: Whether an attempt that the server may have executed is repeated.
    """

    deadline: float
    repeatable: bool = True

    def should_retry(self, error: BaseException) -> bool:
        """Whether another attempt can succeed and is safe."""
        if not isinstance(error, CloudError) or error.kind == "cancelled" or (error.uncertain and not self.repeatable):
            return False
        wait = error.retry_after or 0.0
        if wait > MAX_RETRY_WAIT or time.monotonic() + wait >= self.deadline:
            return False
        return error.status in RETRYABLE_STATUSES if error.status else error.kind in ("provider", "timeout")

    def attempts(self, may_retry: Callable[[], bool] = lambda: True) -> tenacity.Retrying:
        """Return an iterator of attempts; `may_retry` is checked before each retry."""
        backoff = tenacity.wait_random_exponential(multiplier=0.25, max=MAX_RETRY_WAIT / 4)
        return tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: may_retry() and self.should_retry(error)),
            stop=tenacity.stop_after_attempt(MAX_ATTEMPTS),
            wait=lambda state: (getattr(_exception(state), "retry_after", None) or 0.0) + backoff(state),
            sleep=lambda seconds: time.sleep(max(0.0, min(seconds, self.deadline - time.monotonic()))),
            reraise=True,
        )


class ResponseStream:
    """The body of a response as chunks of bytes. Iterating enforces cancellation, the deadline and the size limit.

    Attributes:
        headers: Headers of the response.
        sent_at: When the request was sent, by `time.monotonic()`, after waiting for the rate limiter.
    """

    def __init__(
        self, response: httpx.Response, sent_at: float, deadline: float, is_cancelled: Callable[[], bool], host: str
    ) -> None:
        self.headers, self.sent_at = response.headers, sent_at
        self._response, self._deadline, self._is_cancelled, self._host = response, deadline, is_cancelled, host

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for chunk in self._response.iter_bytes():
            size += len(chunk)
            if self._is_cancelled():
                raise CloudError("cancelled", "Cancelled.", uncertain=True)
            if time.monotonic() > self._deadline:
                raise CloudError("timeout", f"{self._host} did not finish in time. Try again.", uncertain=True)
            if size > MAX_RESPONSE_BYTES:
                raise CloudError("provider", f"The response of {self._host} is too large.", 200, uncertain=True)
            yield chunk


@dataclass(frozen=True)
class MoondreamClient:
    """A client of a server with Moondream's API.

    Attributes:
        url: Base URL, up to /v1.
        key: API key.
        rate: Maximum requests per second, shared by all clients of the same URL and rate.
        timeouts: Timeouts of each call.

    Raises:
        ValueError: If the URL, the rate or the key is malformed. The message does not contain the key.
    """

    url: str = CLOUD_URL
    key: SecretStr | None = None
    rate: float = DEFAULT_RATE
    timeouts: Timeouts = field(default_factory=Timeouts)

    def __post_init__(self) -> None:
        url = httpx.URL(self.url)
        if url.scheme not in ("http", "https") or not url.host or url.query or url.userinfo:
            raise ValueError("A server URL looks like https://api.moondream.ai/v1.")
        if not self.rate > 0:
            raise ValueError("The rate is a number of requests per second, greater than 0.")
        if self.key and not re.fullmatch(r"[!-~]{1,500}", self.key.get_secret_value()):
            raise ValueError("The key contains invalid characters. Copy it again.")

    @property
    def host(self) -> str:
        """Host name of the server."""
        return httpx.URL(self.url).host

    def get(self, path: str, params: Mapping[str, Any] | None = None) -> ApiResponse:
        """Send a GET request. Raises CloudError."""
        return self._call("GET", path, params=params)

    def delete(self, path: str) -> ApiResponse:
        """Send a DELETE request. Raises CloudError."""
        return self._call("DELETE", path)

    def post(
        self, path: str, body: Any, is_cancelled: Callable[[], bool] = lambda: False, repeatable: bool = True
    ) -> ApiResponse:
        """Send a POST request with a JSON body.

        Args:
            path: Path below the base URL.
            body: JSON body.
            is_cancelled: Polled during the call.
            repeatable: Whether an attempt that the server may have executed is repeated. It may then be charged twice,
                see `ApiResponse.possible_extra_charges`. If not, the call fails with an `uncertain` CloudError.

        Raises:
            CloudError: If the call fails.
        """
        return self._call("POST", path, body, is_cancelled=is_cancelled, repeatable=repeatable)

    def stream(
        self, path: str, body: Any, is_cancelled: Callable[[], bool] = lambda: False
    ) -> Iterator[dict[str, Any]]:
        """Send a POST request and yield the JSON objects of its server-sent events, up to the one with "completed".

        The call is retried only until the first event.

        Raises:
            CloudError: If the call fails or the stream ends early.
        """
        deadline = time.monotonic() + self.timeouts.total
        started = False
        for attempt in RetryPolicy(deadline).attempts(may_retry=lambda: not started):  # noqa: B023 (read on each retry)
            with attempt, self._send("POST", path, body, None, is_cancelled, deadline) as response:
                for event in self._parse_events(response):
                    started = True
                    yield event
                    if event.get("completed") is True:
                        return
                raise CloudError("provider", f"The response of {self.host} ended early.", uncertain=True)

    def redact(self, text: str) -> str:
        """Replace the key in a text by [key]."""
        return text.replace(self.key.get_secret_value(), "[key]") if self.key else text

    def _call(
        self,
        method: str,
        path: str,
        body: Any = None,
        params: Mapping[str, Any] | None = None,
        is_cancelled: Callable[[], bool] = lambda: False,
        repeatable: bool = True,
    ) -> ApiResponse:
        deadline = time.monotonic() + self.timeouts.total
        possible_extra_charges = 0
        for attempt in RetryPolicy(deadline, repeatable).attempts():
            with attempt:
                with self._send(method, path, body, params, is_cancelled, deadline) as response:
                    data = self._parse_object(b"".join(response))
                    request_id = str(data.get("request_id") or response.headers.get("x-request-id") or "")[:64]
                seconds = time.monotonic() - response.sent_at
                return ApiResponse(
                    data, request_id, seconds, attempt.retry_state.attempt_number, possible_extra_charges
                )
            possible_extra_charges += bool(getattr(_exception(attempt.retry_state), "uncertain", False))
        raise AssertionError("tenacity returns or raises")

    @contextmanager
    def _send(
        self,
        method: str,
        path: str,
        body: Any,
        params: Mapping[str, Any] | None,
        is_cancelled: Callable[[], bool],
        deadline: float,
    ) -> Iterator[ResponseStream]:
        """Make one attempt: wait for the rate limiter, send the request, check the status. Raises CloudError."""
        if time.monotonic() >= deadline:
            raise CloudError("timeout", f"{self.host} did not answer in time. Try again.", uncertain=True)
        limiter = rate_limiter(self.url, self.rate)
        limiter.acquire(is_cancelled, deadline)
        limits = self.timeouts
        timeout = httpx.Timeout(min(limits.read, limits.attempt), connect=min(limits.connect, limits.attempt))
        sent_at = time.monotonic()
        attempt_deadline = min(deadline, sent_at + limits.attempt)
        responded = False
        try:
            with (
                httpx.Client(timeout=timeout, follow_redirects=False) as client,
                client.stream(
                    method, f"{self.url}/{path}", json=body, params=params, headers=self._headers()
                ) as response,
            ):
                responded = True
                stream = ResponseStream(response, sent_at, attempt_deadline, is_cancelled, self.host)
                if not response.is_success:
                    error = self._status_error(response.status_code, b"".join(stream), response.headers)
                    if error.retry_after:
                        limiter.pause(error.retry_after)
                    raise error
                yield stream
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout):
            raise CloudError("provider", f"{self.host} cannot be reached. Check the network and the address.") from None
        except httpx.TimeoutException:
            raise CloudError("timeout", f"{self.host} did not answer in time. Try again.", uncertain=True) from None
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError):
            if responded:
                message = f"The connection to {self.host} was lost. Try again."
            else:
                message = f"{self.host} closed the connection without a response. Try again."
            raise CloudError("provider", message, uncertain=True) from None

    def _headers(self) -> dict[str, str]:
        if self.key is None:
            return {"User-Agent": USER_AGENT}
        key = self.key.get_secret_value()
        return {"User-Agent": USER_AGENT, "X-Moondream-Auth": key, "Authorization": f"Bearer {key}"}

    def _status_error(self, status: int, body: bytes, headers: Mapping[str, str]) -> CloudError:
        default = SERVER_ERROR_MESSAGE if status >= 500 else CLIENT_ERROR_MESSAGE
        message = STATUS_MESSAGES.get(status, default).format(self.host, status)
        provider_message = self.redact(_provider_message(body))
        if provider_message and status not in (401, 429):
            message += f" Its message: {provider_message}"
        return CloudError(
            ERROR_KINDS.get(status, "provider"),
            message,
            status,
            uncertain=status in RETRYABLE_STATUSES - NOT_EXECUTED_STATUSES,
            retry_after=parse_retry_after(headers.get("retry-after")),
        )

    def _parse_events(self, chunks: ResponseStream) -> Iterator[dict[str, Any]]:
        """Parse server-sent events. Skips comments, event names and [DONE]; accepts a single JSON object as well."""
        buffer = b""
        for chunk in chunks:
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                data = line.strip().removeprefix(b"data:").strip()
                if line.startswith(b"data:") and data and data != b"[DONE]":
                    yield self._parse_object(data)
        if buffer.strip() and not buffer.startswith(b"data:"):
            yield self._parse_object(buffer) | {"completed": True}

    def _parse_object(self, body: bytes) -> dict[str, Any]:
        """Parse a JSON object. Raises CloudError if it is invalid or reports an error."""
        try:
            data = json.loads(body)
        except (ValueError, RecursionError):
            data = None
        if not isinstance(data, dict):
            raise CloudError("provider", f"{self.host} did not return a JSON object. Check its address.", 200)
        if data.get("error"):  # Moondream Station reports errors with status 200
            message = self.redact(_provider_message(body))
            raise CloudError("provider", f"{self.host} failed. Its message: {message}", 200)
        return data


def parse_retry_after(value: str | None) -> float | None:
    """Parse a Retry-After header (seconds or a date) to seconds. Returns None if missing or malformed."""
    if not value:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def photo_data_url(photo: np.ndarray) -> str:
    """Encode a photo (RGB, uint8 [H, W, 3]) as a JPEG data URL with a long side of at most `MAX_PHOTO_SIDE` pixels."""
    return jpeg_data_url(shrink(photo, MAX_PHOTO_SIDE))


def _provider_message(body: bytes) -> str:
    """Extract the error message from a response body as one line; empty for HTML."""
    try:
        message: Any = json.loads(body)
    except (ValueError, RecursionError):
        text = body[:2000].decode("utf-8", "replace")
        return "" if "<" in text else clean(text)[:MAX_PROVIDER_MESSAGE]
    while isinstance(message, dict):
        message = next((message[key] for key in ("error", "message", "detail", "code") if key in message), "")
    return clean(message if isinstance(message, str) else json.dumps(message))[:MAX_PROVIDER_MESSAGE]


def _exception(state: tenacity.RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None
