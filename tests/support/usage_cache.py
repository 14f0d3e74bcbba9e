"""A cache of usage events that is being built for as long as a test needs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support.runs import until
from usage import cache
from usage.cache import CacheBuildingError, EventCache


@contextmanager
def building(event_cache: EventCache, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Start a cache that copies two events at a time, and pause it at the third. Yields a function to continue it."""
    convert, pause, paused, batches = cache._to_arrow, threading.Event(), threading.Event(), iter(range(10**6))

    def convert_and_pause(table: str, rows: Any) -> Any:
        if table == "events" and rows and next(batches) == 1:
            paused.set()
            pause.wait(60)
        return convert(table, rows)

    monkeypatch.setattr(cache, "BATCH_SIZE", 2)
    monkeypatch.setattr(cache, "BUILD_WAIT", 0.01)
    monkeypatch.setattr(cache, "_to_arrow", convert_and_pause)
    event_cache.start()
    until(paused.is_set)

    def is_built() -> bool:
        try:
            with event_cache.read():
                return True
        except CacheBuildingError:
            return False

    def finish() -> None:
        pause.set()
        until(is_built)

    try:
        yield finish
    finally:
        pause.set()
        event_cache.close()
