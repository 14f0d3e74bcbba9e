"""Turns: one at a time on a device, first come first served, with a position that can be seen while waiting."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

POLL_SECONDS = 0.1  # how often somebody who waits looks whether he still wants to


class Cancelled(Exception):
    """Whoever waited or computed does not want to any more."""


class DeviceQueue:
    """The queue before one device."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._line: deque[object] = deque()

    def __len__(self) -> int:
        """How many compute or wait."""
        return len(self._line)

    @contextmanager
    def turn(self, stopped: Callable[[], bool], moved: Callable[[int], None]) -> Iterator[None]:
        """Waits for a turn, and holds it inside the `with` block.

        moved(position): called at the start and at every change; so many are before, 0 is the last call.
        stopped(): asked about ten times a second; when true, the place in the line is given up with Stopped.
        """
        ticket = object()
        with self._condition:
            self._line.append(ticket)
        try:
            self._wait(ticket, stopped, moved)
            yield
        finally:
            with self._condition:
                self._line.remove(ticket)
                self._condition.notify_all()

    def _wait(self, ticket: object, stopped: Callable[[], bool], moved: Callable[[int], None]) -> None:
        seen = -1
        while seen != 0:
            if stopped():
                raise Cancelled
            with self._condition:
                if self._line.index(ticket) == seen:
                    self._condition.wait(POLL_SECONDS)
                position = self._line.index(ticket)
            if position != seen:
                seen = position
                moved(position)
