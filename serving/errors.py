"""Errors of the API: one JSON shape for all of them, {"error": {"type", "message", "request_id"}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from inference.types import InferenceError

# HTTP status -> the error's type, for programs.
TYPES = {
    400: "invalid_request",
    401: "unauthorized",
    402: "budget",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    409: "conflict",
    411: "length_required",
    413: "too_large",
    429: "rate_limited",
    500: "failed",
    503: "unavailable",
}
# Kind of an InferenceError -> HTTP status; 500 for what is not here.
STATUS = {
    "unknown_model": 404,
    "unavailable": 503,
    "missing_weights": 503,
    "out_of_memory": 503,
    "unsupported": 400,
    "too_long": 400,
    "budget": 402,
}


class ErrorBody(BaseModel):
    """What went wrong: `type` for programs, `message` for a person, `request_id` for the log."""

    type: str = Field(examples=["invalid_request"])
    message: str
    request_id: str


class ErrorResponse(BaseModel):
    """The body of every answer that is not 200."""

    error: ErrorBody


class ApiError(HTTPException):
    """A request that is refused; the message tells a person what to do."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, message, headers)


def of_inference(error: InferenceError) -> ApiError:
    """A model's failure as an answer."""
    return ApiError(STATUS.get(error.kind, 500), error.message)


def trouble(status: int, message: str, request_id: str) -> dict[str, Any]:
    """The documented shape."""
    return {"error": {"type": TYPES.get(status, "failed"), "message": message, "request_id": request_id}}


def answer(error: HTTPException, request_id: str) -> JSONResponse:
    """An error as it is sent."""
    headers = {**(error.headers or {}), "X-Request-Id": request_id}
    return JSONResponse(trouble(error.status_code, str(error.detail), request_id), error.status_code, headers)


def install(api: FastAPI) -> None:
    """Makes every error of this application have the one shape."""

    @api.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return answer(error, request.state.request_id)

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        found = "; ".join(_said(problem) for problem in error.errors()[:5])
        return answer(ApiError(400, f"{found}."), request.state.request_id)


def _said(problem: Mapping[str, Any]) -> str:
    """One problem with the body, without what was sent: that may be a photo."""
    place = ".".join(str(part) for part in problem["loc"] if part != "body")
    return f"{place[:100] or 'The body'}: {problem['msg']}"[:300]
