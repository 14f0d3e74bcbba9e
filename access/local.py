"""Recognizes requests from this machine."""

from __future__ import annotations

import ipaddress

from starlette.requests import HTTPConnection

LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


def is_local(connection: HTTPConnection) -> bool:
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
