"""Errors of the /v1 API. All have the JSON body {"error": {"type", "message", "request_id"}}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from inference.types import InferenceError

# HTTP status -> type of the error.
ERROR_TYPES = {
    400: "invalid_request",
    401: "unauthorized",
    402: "budget",
    403: "forbidden",
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
# Kind of an InferenceError -> HTTP status. The default is 500.
INFERENCE_STATUS = {
    "unknown_model": 404,
    "unavailable": 503,
    "missing_weights": 503,
    "out_of_memory": 503,
    "unsupported": 400,
    "too_long": 400,
    "budget": 402,
}
UNEXPECTED_ERROR = "The request failed unexpectedly. Try again; the server's log has the details."


class ErrorBody(BaseModel):
    """An error: `type` for programs, `message` for users, `request_id` for the log."""

    type: str = Field(examples=["invalid_request"])
    message: str
    request_id: str


class ErrorResponse(BaseModel):
    """The body of every response with an error status."""

    error: ErrorBody


class ApiError(HTTPException):
    """Raised to reject a request. The message tells the user what to do."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, message, headers)


def from_inference_error(error: InferenceError) -> ApiError:
    """Convert a model's error to an API error."""
    return ApiError(INFERENCE_STATUS.get(error.kind, 500), error.message)


def error_type(error: HTTPException) -> str:
    """Return the `ErrorBody.type` of an error."""
    return ERROR_TYPES.get(error.status_code, "failed")


def error_body(status: int, message: str, request_id: str) -> dict[str, Any]:
    """Return an `ErrorResponse` as JSON."""
    error_type = ERROR_TYPES.get(status, "failed")
    return {"error": {"type": error_type, "message": message, "request_id": request_id}}


def error_response(error: HTTPException, request_id: str) -> JSONResponse:
    """Return the HTTP response of an error."""
    headers = {**(error.headers or {}), "X-Request-Id": request_id}
    return JSONResponse(error_body(error.status_code, str(error.detail), request_id), error.status_code, headers)


def add_exception_handlers(api: FastAPI) -> None:
    """Make the application return every error as an `ErrorResponse`."""

    @api.exception_handler(HTTPException)
    async def handle_http_exception(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(error, request.state.request_id)

    @api.exception_handler(RequestValidationError)
    async def handle_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(ApiError(400, describe_problems(error.errors())), request.state.request_id)

    @api.exception_handler(Exception)
    async def handle_bug(request: Request, _: Exception) -> JSONResponse:
        return error_response(ApiError(500, UNEXPECTED_ERROR), request.state.request_id)


def describe_problems(problems: Sequence[Mapping[str, Any]]) -> str:
    """Describe the first validation errors of pydantic in one sentence."""
    return "; ".join(_describe(problem) for problem in problems[:5]) + "."


def _describe(problem: Mapping[str, Any]) -> str:
    """Describe a validation error without the value, which may be a photo."""
    location = ".".join(str(part) for part in problem["loc"] if part != "body")
    return f"{location[:100] or 'body'}: {problem['msg']}"[:300]
