"""HTTP to Moondream Cloud and whatever speaks its API: timeouts that hold, retries that cannot hurt, a shared limiter,
and errors that tell a person what to do. No key is ever in a text that leaves this file."""

from __future__ import annotations

import json
import re
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any

import cv2
import httpx
import numpy as np
import tenacity
from pydantic import SecretStr

from inference.places import CLOUD_URL, RATE
from inference.types import InferenceError, clean
from recipes import shrink

RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504, *range(520, 525)})
UNDONE = frozenset({408, 425, 429, 503})  # of these: nothing has been computed, nothing is charged
TRIES = 4
MAX_WAIT = 30.0  # seconds between two tries; who says to wait longer is not waited for
MAX_REPLY = 32_000_000  # bytes
MAX_SIDE = 2048  # px; Moondream cuts a photo into tiles of some 1.8 megapixels together
MAX_WORDS = 300  # characters of a provider's own words that are shown
AGENT = "moondream-playground"

# What a status means to a person. {0} is the server's host name.
ADVICE = {
    401: "{0} does not accept the key. Check it, or make a new one.",
    402: "The account at {0} has no credit. Add some there, or use another key.",
    403: "The key has no right to do this at {0}, or its account has no credit. Check both there.",
    404: "{0} knows no such model or function. Choose another model.",
    408: "{0} waited too long for the request. Try again.",
    410: "This is not kept at {0} any more.",
    413: "The photo is too large for {0}. Take a smaller one.",
    429: "{0} is asked too often. Wait a little and try again, or ask for fewer candidates.",
}
TROUBLE = "{0} has trouble (status {1}). Try again later; if it stays, its status page may know more."
REFUSED = "{0} refused the request (status {1})."


class CloudError(InferenceError):
    """A call that failed. `status` is HTTP's, or None where none came.

    uncertain: the request may have been carried out, and charged, all the same. Kinds (see InferenceError): provider,
    cancelled; `key` (401), `credit` (402, 403), `unknown_model` (404), `too_large` (413), `busy` (429), `timeout`.
    """

    def __init__(self, kind: str, message: str, status: int | None = None, uncertain: bool = False) -> None:
        super().__init__(kind, message)
        self.status = status
        self.uncertain = uncertain


KINDS = {401: "key", 402: "credit", 403: "credit", 404: "unknown_model", 413: "too_large", 429: "busy"}


@dataclass(frozen=True)
class Timeouts:
    """Seconds: to connect; between two pieces of an answer; for one try; for all tries together.

    A try whose pieces come too slowly is given up with the first piece after its time, so after `read` more at most.
    """

    connect: float = 10.0
    read: float = 30.0
    one: float = 120.0
    all: float = 240.0


@dataclass(frozen=True)
class Reply:
    """What came back: the JSON object, its request id, seconds of the last try and how many tries it took.

    perhaps_charged: how many earlier tries were lost in a way that they may have been carried out, and charged, too.
    """

    data: dict[str, Any]
    request_id: str = ""
    seconds: float = 0.0
    tries: int = 1
    perhaps_charged: int = 0


class Limiter:
    """At most `rate` requests a second, whoever asks; first come, first served."""

    def __init__(self, rate: float) -> None:
        self._gap = 1 / rate
        self._lock = threading.Lock()
        self._next = 0.0

    def wait(self, stopped: Callable[[], bool], until: float) -> None:
        """Returns when it is one's turn. Raises CloudError when `stopped`, or when the turn is later than `until`."""
        with self._lock:
            turn = max(self._next, time.monotonic())
            if turn > until:
                raise CloudError("busy", "Too many requests are waiting already. Try again in a moment.")
            self._next = turn + self._gap
        _sleep(turn - time.monotonic(), stopped)

    def pause(self, seconds: float) -> None:
        """Nobody asks for so long: the server wants it so."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


@lru_cache(maxsize=64)
def limiter(url: str, rate: float) -> Limiter:
    """The limiter of a server: one per process."""
    return Limiter(rate)


@dataclass(frozen=True)
class MoondreamClient:
    """A server that speaks Moondream's API. url: up to and with /v1. key: of Moondream Cloud, or of a deployment."""

    url: str = CLOUD_URL
    key: SecretStr | None = None
    rate: float = RATE
    timeouts: Timeouts = field(default_factory=Timeouts)

    def __post_init__(self) -> None:
        """Raises ValueError for an address or a key that cannot be one; the message does not contain the key."""
        address = httpx.URL(self.url)
        if address.scheme not in ("http", "https") or not address.host or address.query or address.userinfo:
            raise ValueError("A server's address looks like https://api.moondream.ai/v1.")
        if not self.rate > 0:
            raise ValueError("The rate is a number of requests a second, more than 0.")
        if self.key and not re.fullmatch(r"[!-~]{1,500}", self.key.get_secret_value()):
            raise ValueError("The key has characters that no key has. Copy it again.")

    @property
    def host(self) -> str:
        return httpx.URL(self.url).host

    def get(self, path: str, params: Mapping[str, Any] | None = None) -> Reply:
        """One GET. Raises CloudError."""
        return self._tried("GET", path, None, params, _never, repeatable=True)

    def delete(self, path: str) -> Reply:
        """One DELETE. Raises CloudError."""
        return self._tried("DELETE", path, None, None, _never, repeatable=True)

    def post(self, path: str, body: Any, stopped: Callable[[], bool] = lambda: False, repeatable: bool = True) -> Reply:
        """One POST with a JSON body. Raises CloudError.

        repeatable: whether a try that may have been carried out is repeated (it may then be charged twice, which
        `Reply.perhaps_charged` tells). Otherwise it raises CloudError with `uncertain`.
        """
        return self._tried("POST", path, body, None, stopped, repeatable)

    def stream(self, path: str, body: Any, stopped: Callable[[], bool] = lambda: False) -> Iterator[dict[str, Any]]:
        """One POST whose answer comes in pieces (server-sent events), as JSON objects up to that with "completed".

        Repeated only as long as nothing has come. Raises CloudError, also for a stream that ends early.
        """
        until = time.monotonic() + self.timeouts.all
        tries = RetryPolicy(until, repeatable=True)
        for attempt in tries:
            with attempt, self._sent("POST", path, body, None, stopped, until) as pieces:
                tries.begun = False
                for event in self._events(pieces):
                    tries.begun = True
                    yield event
                    if event.get("completed") is True:
                        return
                raise CloudError("provider", f"The answer of {self.host} broke off.", uncertain=True)

    def _tried(
        self,
        method: str,
        path: str,
        body: Any,
        params: Mapping[str, Any] | None,
        stopped: Callable[[], bool],
        repeatable: bool,
    ) -> Reply:
        until = time.monotonic() + self.timeouts.all
        tries = RetryPolicy(until, repeatable)
        for attempt in tries:
            with attempt:
                with self._sent(method, path, body, params, stopped, until) as pieces:
                    data = self._object(b"".join(pieces))
                    request_id = str(data.get("request_id") or pieces.headers.get("x-request-id") or "")[:64]
                return Reply(data, request_id, time.monotonic() - pieces.began, tries.number, tries.perhaps)
        raise AssertionError("tenacity ends with a result or an exception")

    @contextmanager
    def _sent(
        self,
        method: str,
        path: str,
        body: Any,
        params: Mapping[str, Any] | None,
        stopped: Callable[[], bool],
        until: float,
    ) -> Iterator[_Pieces]:
        """One try: waits for its turn, sends, checks the status and hands out the answer's bytes. Raises CloudError."""
        if time.monotonic() >= until:
            raise CloudError("timeout", f"{self.host} did not answer in time. Try again.", uncertain=True)
        limit = limiter(self.url, self.rate)
        limit.wait(stopped, until)
        over = min(until, time.monotonic() + self.timeouts.one)
        times = self.timeouts
        timeout = httpx.Timeout(min(times.read, times.one), connect=min(times.connect, times.one))
        sent, began = False, time.monotonic()
        try:
            with (
                httpx.Client(timeout=timeout, follow_redirects=False) as client,
                client.stream(method, f"{self.url}/{path}", json=body, params=params, headers=self._headers) as reply,
            ):
                sent = True
                pieces = _Pieces(reply, began, over, stopped, self.host)
                if not reply.is_success:
                    error = self._error(reply.status_code, b"".join(pieces), reply.headers)
                    if error.wait:
                        limit.pause(error.wait)
                    raise error
                yield pieces
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout):
            raise CloudError("provider", f"{self.host} cannot be reached. Check the network and the address.") from None
        except httpx.TimeoutException:
            raise CloudError("timeout", f"{self.host} did not answer in time. Try again.", uncertain=True) from None
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError):
            words = "The connection to {0} broke off." if sent else "{0} ended the connection without an answer."
            raise CloudError("provider", f"{words.format(self.host)} Try again.", uncertain=True) from None

    @property
    def _headers(self) -> dict[str, str]:
        if self.key is None:
            return {"User-Agent": AGENT}
        key = self.key.get_secret_value()
        return {"User-Agent": AGENT, "X-Moondream-Auth": key, "Authorization": f"Bearer {key}"}

    def _error(self, status: int, body: bytes, headers: Mapping[str, str]) -> _Refused:
        """A status as an error for a person, with the provider's own words where they may help."""
        if status in ADVICE:
            words = ADVICE[status].format(self.host)
        else:
            words = (TROUBLE if status >= 500 else REFUSED).format(self.host, status)
        theirs = self.redacted(_their_words(body))
        if theirs and (status >= 500 or status not in (401, 429)):
            words += f" It says: {theirs}"
        wait = retry_after(headers.get("retry-after"))
        return _Refused(KINDS.get(status, "provider"), words, status, status in RETRIED - UNDONE, wait)

    def _events(self, pieces: _Pieces) -> Iterator[dict[str, Any]]:
        """The JSON objects of server-sent events; other lines (comments, names, [DONE]) are passed over."""
        rest = b""
        for piece in pieces:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                words = line.strip().removeprefix(b"data:").strip()
                if line.startswith(b"data:") and words and words != b"[DONE]":
                    yield self._object(words)
        if rest.strip() and not rest.startswith(b"data:"):
            yield self._object(rest) | {"completed": True}  # no stream: the whole answer, or an error

    def _object(self, body: bytes) -> dict[str, Any]:
        """A JSON object that tells no error. Raises CloudError."""
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise CloudError("provider", f"{self.host} answered with something else than JSON. Check its address.", 200)
        if found.get("error"):  # Moondream Station says so with status 200
            words = self.redacted(_their_words(body))
            raise CloudError("provider", f"{self.host} failed. It says: {words}", 200)
        return found

    def redacted(self, text: str) -> str:
        """The text without the key, however it came in."""
        return text.replace(self.key.get_secret_value(), "[key]") if self.key else text


class _Refused(CloudError):
    """A status that is no success; `wait`: the seconds that the server wants to be left alone."""

    def __init__(self, kind: str, message: str, status: int, uncertain: bool, wait: float | None) -> None:
        super().__init__(kind, message, status, uncertain)
        self.wait = wait


class RetryPolicy(tenacity.Retrying):
    """Tries of one call: only where another one can help and cannot hurt, with jitter, and as the server wishes.

    begun: set while something of an answer has come, after which there is no other try. perhaps: tries that were lost
    and may have been carried out.
    """

    def __init__(self, until: float, repeatable: bool) -> None:
        self.until, self.repeatable, self.begun = until, repeatable, False
        self.number, self.perhaps = 0, 0
        backoff = tenacity.wait_random_exponential(multiplier=0.25, max=MAX_WAIT / 4)
        super().__init__(
            retry=tenacity.retry_if_exception(self._again),
            stop=tenacity.stop_after_attempt(TRIES),
            wait=lambda state: (getattr(_failure(state), "wait", None) or 0.0) + backoff(state),
            before=self._count,
            before_sleep=self._lost,
            sleep=self._sleep,
            reraise=True,
        )

    def _count(self, state: tenacity.RetryCallState) -> None:
        self.number = state.attempt_number

    def _again(self, error: BaseException) -> bool:
        if not isinstance(error, CloudError) or self.begun or error.kind == "cancelled":
            return False
        if error.uncertain and not self.repeatable:
            return False
        wait = getattr(error, "wait", None) or 0.0
        if wait > MAX_WAIT or time.monotonic() + wait >= self.until:
            return False
        return error.status in RETRIED if error.status else error.kind in ("provider", "timeout")

    def _lost(self, state: tenacity.RetryCallState) -> None:
        self.perhaps += bool(getattr(_failure(state), "uncertain", False))

    def _sleep(self, seconds: float) -> None:
        time.sleep(max(0.0, min(seconds, self.until - time.monotonic())))


def _failure(state: tenacity.RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


class _Pieces:
    """The bytes of an answer as they come, up to MAX_REPLY, until it takes too long or nobody wants them any more.

    began: when the request was sent, after it had waited for its turn.
    """

    def __init__(
        self, reply: httpx.Response, began: float, over: float, stopped: Callable[[], bool], host: str
    ) -> None:
        self.headers, self.began = reply.headers, began
        self._reply, self._over, self._stopped, self._host = reply, over, stopped, host

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for piece in self._reply.iter_bytes():
            size += len(piece)
            if self._stopped():
                raise CloudError("cancelled", "Cancelled.", uncertain=True)
            if time.monotonic() > self._over:
                raise CloudError("timeout", f"{self._host} did not finish in time. Try again.", uncertain=True)
            if size > MAX_REPLY:
                raise CloudError("provider", f"The answer of {self._host} is too large.", 200, uncertain=True)
            yield piece


def _their_words(body: bytes) -> str:
    """What a provider says of an error, in one line; nothing where it says it in HTML."""
    try:
        said: Any = json.loads(body)
    except (ValueError, RecursionError):
        text = body[:2000].decode("utf-8", "replace")
        return "" if "<" in text else clean(text)[:MAX_WORDS]
    while isinstance(said, dict):
        said = next((said[name] for name in ("error", "message", "detail", "code") if name in said), "")
    return clean(said if isinstance(said, str) else json.dumps(said))[:MAX_WORDS]


def retry_after(text: str | None) -> float | None:
    """Seconds, from seconds or a date; None where neither is said."""
    if not text:
        return None
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def photo_url(photo: np.ndarray, side: int = MAX_SIDE) -> str:
    """A photo (uint8 [H, W, 3], RGB) as a JPEG data URL of at most `side` pixels on its longer side."""
    picture = cv2.cvtColor(shrink(photo, side), cv2.COLOR_RGB2BGR)
    done, coded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 92])
    if not done:
        raise CloudError("failed", "The photo could not be written as a JPEG. Choose another one.")
    return "data:image/jpeg;base64," + b64encode(coded.tobytes()).decode("ascii")


def _never() -> bool:
    return False


def _sleep(seconds: float, stopped: Callable[[], bool]) -> None:
    """Sleeps, and wakes up every tenth of a second to see whether it is still wanted. Raises CloudError."""
    end = time.monotonic() + seconds
    while True:
        if stopped():
            raise CloudError("cancelled", "Cancelled.")
        left = end - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(left, 0.1))
