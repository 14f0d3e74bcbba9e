"""Who may use the API: keys, compared in constant time as digests, and how often each may ask."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import math
import threading
import time
from collections.abc import Callable, Sequence

from starlette.requests import HTTPConnection

from serving.errors import ApiError

LOCAL = "local"  # the tenant of a deployment without keys
BURST = 4.0  # seconds' worth of requests that may come at once
NAMES = ("localhost", "127.0.0.1", "[::1]")
NO_KEY = "This API needs a key of this deployment in the header X-Moondream-Auth."
CLOSED = "This API is open to its own machine alone. Set PLAYGROUND_API_KEYS to let others in, each with a key."


class ApiKeyAuth:
    """The keys of a deployment, as SHA-256 digests in hexadecimal; without any, only its own machine may ask.

    rate: requests a second for each key. Nobody is limited where there are no keys.
    """

    def __init__(
        self, digests: Sequence[str] = (), rate: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._digests, self._rate, self._clock = tuple(digests), rate, clock
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}  # tenant -> requests left, and when that was

    def tenant(self, connection: HTTPConnection) -> str:
        """Whose request it is: a short name that tells no key. Raises ApiError (401, 429)."""
        if not self._digests:
            if not _from_here(connection):
                raise ApiError(401, CLOSED)
            return LOCAL
        digest = hashlib.sha256(_said(connection).encode("utf-8", "surrogateescape")).hexdigest()
        known = [hmac.compare_digest(digest, ours) for ours in self._digests]  # all of them, whichever it is
        if not any(known):
            raise ApiError(401, NO_KEY)
        self._take(digest[:16])
        return digest[:16]

    def _take(self, tenant: str) -> None:
        most = max(1.0, self._rate * BURST)
        with self._lock:
            now = self._clock()
            left, then = self._buckets.get(tenant, (most, now))
            left = min(most, left + (now - then) * self._rate)
            self._buckets[tenant] = (left - 1 if left >= 1 else left, now)
        if left < 1:
            wait = {"Retry-After": str(math.ceil((1 - left) / self._rate))}
            raise ApiError(429, f"This key may ask {self._rate:g} times a second. Wait a moment.", wait)


def _said(connection: HTTPConnection) -> str:
    bearer = connection.headers.get("authorization", "")
    return connection.headers.get("x-moondream-auth") or (bearer[7:] if bearer[:7].lower() == "bearer " else "")


def _from_here(connection: HTTPConnection) -> bool:
    """Whether the peer is this machine, and means it: the page of another site may send requests to this machine, too,
    but under that site's name or with its Origin."""
    try:
        loopback = connection.client is not None and ipaddress.ip_address(connection.client.host).is_loopback
    except ValueError:
        loopback = False
    host = connection.headers.get("host", "")
    origin = connection.headers.get("origin", "")
    return loopback and _name(host) in NAMES and (not origin or _name(origin.partition("://")[2]) in NAMES)


def _name(host: str) -> str:
    return host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]
