"""Parses and validates large JSON bodies in a thread, so that the event loop keeps answering other requests."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

import pydantic_core
from anyio import CapacityLimiter, to_thread
from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError

from serving.errors import ApiError, describe_problems

MAX_INLINE = 2**20  # bytes; smaller bodies are parsed on the event loop
MAX_VALUES = 4_000_000  # per body; a parser holds the interpreter lock, also in a thread (4 million values: 0.3 s)
MAX_PARSERS = 2  # bodies that are parsed at the same time


class JsonRoute(APIRoute):
    """A route whose JSON body is parsed by `JsonRequest`. Schema and errors are those of an ordinary route."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of the route."""
        handler = super().get_route_handler()
        body_params = self.dependant.body_params
        if not body_params:
            return handler
        annotation: Any = body_params[0].field_info.annotation
        adapter, limiter = TypeAdapter(annotation), CapacityLimiter(MAX_PARSERS)

        async def handle(request: Request) -> Response:
            return await handler(JsonRequest(request, adapter, limiter))

        return handle


class JsonRequest(Request):
    """A request whose `json()` parses and validates a body of more than `MAX_INLINE` bytes in a thread."""

    def __init__(self, request: Request, adapter: TypeAdapter[Any], limiter: CapacityLimiter) -> None:
        """Wrap a request.

        Args:
            request: The request.
            adapter: Validates the body.
            limiter: Limits the number of threads.
        """
        super().__init__(request.scope, request.receive)
        self.adapter, self.limiter = adapter, limiter

    async def json(self) -> Any:
        """Return the body: validated if it is large, which FastAPI accepts as it is, otherwise only parsed.

        Raises:
            json.JSONDecodeError: The body is not JSON.
            ApiError: The body is large, and invalid (400) or with more than `MAX_VALUES` values (413).
        """
        body = await self.body()
        if len(body) <= MAX_INLINE:
            return json.loads(body)
        return await to_thread.run_sync(parse_json, body, self.adapter, limiter=self.limiter)


def parse_json(body: bytes, adapter: TypeAdapter[Any]) -> Any:
    """Parse and validate a JSON body; see `JsonRequest.json`."""
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ApiError(413, f"The request has more than {MAX_VALUES:,} values. Send fewer.")
    try:
        data = pydantic_core.from_json(body)
    except ValueError:
        data = json.loads(body)  # accepts other encodings, and raises the error that FastAPI reports
    try:
        return adapter.validate_python(data, from_attributes=True)  # as FastAPI does
    except ValidationError as error:
        raise ApiError(400, describe_problems(error.errors(include_url=False, include_input=False))) from None
