"""API keys of the /v1 API, and a rate limit per key."""

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

LOCAL_TENANT = "local"  # the tenant of a deployment without keys
BURST_SECONDS = 4.0  # a key may send this many seconds' worth of requests at once
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
INVALID_KEY = "This API needs a valid key in the header X-Moondream-Auth."
LOCAL_ONLY = "Without API keys only this machine may use the API. Set PLAYGROUND_API_KEYS to allow other clients."


class ApiKeyAuth:
    """Authenticates requests by API key. Without keys, only requests from this machine are allowed.

    Keys are stored as digests and compared in constant time.
    """

    def __init__(
        self, digests: Sequence[str] = (), rate: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Create the authentication.

        Args:
            digests: SHA-256 digests of the keys, in hexadecimal.
            rate: Requests per second for each key. Without keys there is no limit.
            clock: Returns the time in seconds.
        """
        self._digests, self._rate, self._clock = tuple(digests), rate, clock
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}  # tenant -> remaining requests, time of the last update

    def authenticate(self, connection: HTTPConnection) -> str:
        """Return the tenant of a request: a short name from which the key cannot be derived.

        Raises:
            ApiError: The key is invalid or missing (401), or exceeds its rate limit (429).
        """
        if not self._digests:
            if not _is_local(connection):
                raise ApiError(401, LOCAL_ONLY)
            return LOCAL_TENANT
        digest = hashlib.sha256(_read_key(connection).encode("utf-8", "surrogateescape")).hexdigest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # constant time: compare all
        if not any(matches):
            raise ApiError(401, INVALID_KEY)
        tenant = digest[:16]
        self._check_rate(tenant)
        return tenant

    def _check_rate(self, tenant: str) -> None:
        """Take a token from the tenant's bucket. Raises ApiError (429) if it is empty."""
        capacity = max(1.0, self._rate * BURST_SECONDS)
        with self._lock:
            now = self._clock()
            tokens, updated = self._buckets.get(tenant, (capacity, now))
            tokens = min(capacity, tokens + (now - updated) * self._rate)
            self._buckets[tenant] = (tokens - 1 if tokens >= 1 else tokens, now)
        if tokens < 1:
            headers = {"Retry-After": str(math.ceil((1 - tokens) / self._rate))}
            raise ApiError(429, f"This key may send {self._rate:g} requests per second. Try again later.", headers)


def _read_key(connection: HTTPConnection) -> str:
    bearer = connection.headers.get("authorization", "")
    return connection.headers.get("x-moondream-auth") or (bearer[7:] if bearer[:7].lower() == "bearer " else "")


def _is_local(connection: HTTPConnection) -> bool:
    """Check that a request comes from this machine, and not from another site's page in a browser on this machine.

    Such pages are recognized by the Host header (DNS rebinding) or the Origin header.
    """
    try:
        loopback = connection.client is not None and ipaddress.ip_address(connection.client.host).is_loopback
    except ValueError:
        loopback = False
    host = connection.headers.get("host", "")
    origin = connection.headers.get("origin", "")
    return (
        loopback
        and _hostname(host) in LOCAL_HOSTS
        and (not origin or _hostname(origin.partition("://")[2]) in LOCAL_HOSTS)
    )


def _hostname(host: str) -> str:
    return host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]
