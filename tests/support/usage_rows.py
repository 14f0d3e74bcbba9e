"""Reads recorded usage events over HTTP."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable

import httpx

TIMEOUT = 30.0  # seconds until an event must have been delivered to the database


def read_usage(server: str, headers: dict[str, str] | None = None) -> list[dict[str, str]]:
    """Return the recorded events, oldest first, from the address of the API (up to /v1)."""
    rows = csv.DictReader(io.StringIO(httpx.get(f"{server}/usage.csv", headers=headers, timeout=30).text))
    return sorted(rows, key=lambda row: row["time"])


def wait_for_usage(
    server: str, matches: Callable[[dict[str, str]], bool], count: int = 1, headers: dict[str, str] | None = None
) -> list[dict[str, str]]:
    """Wait until at least `count` events match, and return all that do."""
    deadline = time.monotonic() + TIMEOUT
    while len(rows := [row for row in read_usage(server, headers) if matches(row)]) < count:
        assert time.monotonic() < deadline, f"{len(rows)} of {count} usage events: {rows}"
        time.sleep(0.1)
    return rows
