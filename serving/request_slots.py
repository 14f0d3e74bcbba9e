"""Runs functions in threads for a limited number of requests; further requests are rejected at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import anyio
from anyio import CapacityLimiter, to_thread

from serving.errors import ApiError

T = TypeVar("T")


class RequestSlots:
    """The slots of running and waiting requests, each with its thread."""

    def __init__(self, count: int) -> None:
        self._slots, self._threads = CapacityLimiter(count), CapacityLimiter(count)

    async def run(self, function: Callable[[], T]) -> T:
        """Run a function in a thread, which completes it even if this coroutine is cancelled.

        Raises:
            ApiError: All slots are taken (503).
        """
        holder = object()
        try:
            self._slots.acquire_on_behalf_of_nowait(holder)
        except anyio.WouldBlock:
            message = "Too many requests are waiting. Try again in a few seconds."
            raise ApiError(503, message, {"Retry-After": "2"}) from None
        try:
            return await to_thread.run_sync(function, limiter=self._threads, abandon_on_cancel=True)
        finally:
            self._slots.release_on_behalf_of(holder)
