"""Limits of the comparisons that one visitor may run and start."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from access.roles import Role, Visitor

MAX_RUNNING = 2  # comparisons of one visitor at the same time
MAX_RUNNING_SHARED = 4  # of all API clients without a session together
MAX_STARTS = 30  # comparisons that one visitor starts per minute
WINDOW = 60.0  # seconds


class LimitError(Exception):
    """Raised when a visitor has reached a limit. The message says what to do."""


@dataclass
class _Calls:
    """The comparisons of one visitor: how many are running, and when the recent ones started."""

    running: int = 0
    starts: deque[float] = field(default_factory=deque)


class ComparisonLimiter:
    """Limits the comparisons of each visitor. Administrators have no limit. Several threads can share it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Create a limiter. `clock` returns the time in seconds."""
        self._clock = clock
        self._lock = threading.Lock()
        self._calls: dict[str, _Calls] = {}

    @contextmanager
    def admit(self, visitor: Visitor) -> Iterator[None]:
        """Count one comparison as running while the context is open.

        Visitors are told apart by their browser or API key; guests without either share one limit.

        Raises:
            LimitError: If too many comparisons are running or were started.
        """
        if visitor.role == Role.ADMIN:
            yield
            return
        name = visitor.hash or (visitor.id if visitor.role > Role.GUEST else "")
        self._begin(name)
        try:
            yield
        finally:
            with self._lock:
                self._calls[name].running -= 1

    def _begin(self, name: str) -> None:
        with self._lock:
            now = self._clock()
            self._forget_before(now - WINDOW)
            calls = self._calls.setdefault(name, _Calls())
            limit = MAX_RUNNING if name else MAX_RUNNING_SHARED
            if calls.running >= limit:
                raise LimitError(
                    f"You have {limit} comparisons running. Wait for one to finish or cancel it."
                    if name
                    else f"{limit} comparisons of clients without a session are running. Try again in a few seconds."
                )
            if len(calls.starts) >= MAX_STARTS:
                seconds = calls.starts[0] + WINDOW - now
                raise LimitError(
                    f"There were {MAX_STARTS} comparisons in the last minute. Try again in {max(1, round(seconds))} s."
                )
            calls.running += 1
            calls.starts.append(now)

    def _forget_before(self, time: float) -> None:
        """Forget starts before a time, and visitors without any others."""
        for name, calls in list(self._calls.items()):
            while calls.starts and calls.starts[0] <= time:
                calls.starts.popleft()
            if not calls.starts and not calls.running:
                del self._calls[name]
