"""API keys of the /v1 API, a rate limit per key, and the read-only token for metrics."""

from __future__ import annotations

import hashlib
import hmac
import math
import threading
import time
from collections.abc import Callable, Sequence

from starlette.requests import HTTPConnection

from access.local import is_local
from serving.errors import ApiError

TENANT_LENGTH = 16  # hexadecimal digits of the key's digest
LOCAL_TENANT = "local"  # the tenant of a deployment without keys
BURST_SECONDS = 4.0  # a key may send this many seconds' worth of requests at once
INVALID_KEY = "This API needs a valid key in the header X-Moondream-Auth."
NO_KEYS = "This API is closed, because this deployment has no API keys. Its administrator can set PLAYGROUND_API_KEYS."
LOCAL_ONLY = "Without API keys only this machine may use the API. Set PLAYGROUND_API_KEYS to allow other clients."


class ApiKeyAuth:
    """Authenticates requests by API key. Without keys, only requests from this machine are allowed, or none.

    Keys are stored as digests and compared in constant time.
    """

    def __init__(
        self,
        digests: Sequence[str] = (),
        rate: float = 10.0,
        metrics_token_digest: str = "",
        allow_local: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create the authentication.

        Args:
            digests: SHA-256 digests of the keys, in hexadecimal.
            rate: Requests per second for each key. Without keys there is no limit.
            metrics_token_digest: SHA-256 digest of the token that may only read metrics, or "" for none.
            allow_local: Whether requests from this machine need no key if there are none. False where a proxy on this
                machine may pass other clients' requests on.
            clock: Returns the time in seconds.
        """
        self._digests, self._rate, self._clock = tuple(digests), rate, clock
        self._metrics_token_digest, self._allow_local = metrics_token_digest, allow_local
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}  # tenant -> remaining requests, time of the last update

    def authenticate(self, connection: HTTPConnection) -> str:
        """Return the tenant of a request: a short name from which the key cannot be derived.

        Raises:
            ApiError: The key is invalid or missing (401), or exceeds its rate limit (429).
        """
        if not self._digests:
            if not self._allow_local:
                raise ApiError(401, NO_KEYS)
            if not is_local(connection):
                raise ApiError(401, LOCAL_ONLY)
            return LOCAL_TENANT
        tenant = self.tenant_of(connection)
        if tenant is None:
            raise ApiError(401, INVALID_KEY)
        self._check_rate(tenant)
        return tenant

    def tenant_of(self, connection: HTTPConnection) -> str | None:
        """Return the tenant of a request with a valid key, otherwise None. Does not count against the rate limit."""
        digest = _digest(_read_key(connection))
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # constant time: compare all
        return digest[:TENANT_LENGTH] if any(matches) else None

    def is_metrics_token(self, connection: HTTPConnection) -> bool:
        """Whether the header `Authorization: Bearer` contains the token that may only read metrics."""
        if not self._metrics_token_digest:
            return False
        return hmac.compare_digest(_digest(_read_bearer(connection)), self._metrics_token_digest)

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
    return connection.headers.get("x-moondream-auth") or _read_bearer(connection)


def _read_bearer(connection: HTTPConnection) -> str:
    header = connection.headers.get("authorization", "")
    return header[7:] if header[:7].lower() == "bearer " else ""


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
