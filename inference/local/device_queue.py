"""A first-come, first-served queue for one device, with visible positions and cancellation."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

POLL_SECONDS = 0.1  # poll interval for cancellation


class Cancelled(Exception):  # noqa: N818
    """Raised when the caller cancels."""


class DeviceQueue:
    """The queue of one device. `len(queue)` counts the running and the waiting requests."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._tickets: deque[object] = deque()

    def __len__(self) -> int:
        return len(self._tickets)

    @contextmanager
    def acquire(self, is_cancelled: Callable[[], bool], on_position: Callable[[int], None]) -> Iterator[None]:
        """Wait for the device and hold it inside the `with` block.

        Args:
            is_cancelled: Polled about ten times per second while waiting.
            on_position: Called with the number of requests ahead, at first and at each change. The last call gets 0.

        Raises:
            Cancelled: If `is_cancelled` returns True before the device is acquired.
        """
        ticket = object()
        with self._condition:
            self._tickets.append(ticket)
        try:
            last_position = -1
            while last_position != 0:
                if is_cancelled():
                    raise Cancelled
                with self._condition:
                    if self._tickets.index(ticket) == last_position:
                        self._condition.wait(POLL_SECONDS)
                    position = self._tickets.index(ticket)
                if position != last_position:
                    last_position = position
                    on_position(position)
            yield
        finally:
            with self._condition:
                self._tickets.remove(ticket)
                self._condition.notify_all()
