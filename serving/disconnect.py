"""Detects that a client disconnects while its request is computed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Request


@asynccontextmanager
async def cancel_on_disconnect(http_request: Request, cancel: threading.Event) -> AsyncIterator[None]:
    """Set `cancel` when the client disconnects inside the block, or when the block raises, as at a shutdown.

    Args:
        http_request: The request, whose body was read.
        cancel: Set to cancel the computation.
    """
    watch = asyncio.create_task(_watch(http_request, cancel))
    try:
        yield
    except BaseException:
        cancel.set()
        raise
    finally:
        watch.cancel()
        await asyncio.wait([watch])


async def _watch(http_request: Request, cancel: threading.Event) -> None:
    while (await http_request.receive())["type"] != "http.disconnect":
        pass
    cancel.set()
