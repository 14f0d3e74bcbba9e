"""Errors of the /v1 API. All have the JSON body {"error": {"type", "message", "request_id"}}.

On the routes of OpenAI's API, the body also has the fields of OpenAI's errors, with OpenAI's types.
"""

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
# HTTP status -> type of the error on the routes of OpenAI's API. The default is "invalid_request_error".
OPENAI_ERROR_TYPES = {
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
OPENAI_PATH = "/chat/completions"
BUSY_RETRY_SECONDS = 5
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


class OpenAIErrorBody(ErrorBody):
    """An error in OpenAI's shape: `code` for programs, `param` is the field that is wrong, if it is known."""

    type: str = Field(examples=["invalid_request_error"])
    code: str | None
    param: str | None


class OpenAIErrorResponse(BaseModel):
    """The body of every response with an error status on the routes of OpenAI's API."""

    error: OpenAIErrorBody


class ApiError(HTTPException):
    """Raised to reject a request. The message tells the user what to do; `param` names the field that is wrong."""

    def __init__(
        self, status: int, message: str, headers: Mapping[str, str] | None = None, param: str | None = None
    ) -> None:
        super().__init__(status, message, headers)
        self.param = param


def from_inference_error(error: InferenceError) -> ApiError:
    """Convert a model's error to an API error. A model that is out of memory may have some later."""
    headers = {"Retry-After": str(BUSY_RETRY_SECONDS)} if error.kind == "out_of_memory" else None
    return ApiError(INFERENCE_STATUS.get(error.kind, 500), error.message, headers)


def error_type(error: HTTPException) -> str:
    """Return the `ErrorBody.type` of an error."""
    return ERROR_TYPES.get(error.status_code, "failed")


def error_body(error: HTTPException, request_id: str, path: str = "") -> dict[str, Any]:
    """Return an `ErrorResponse` as JSON; on the routes of OpenAI's API an `OpenAIErrorResponse`."""
    kind = error_type(error)
    body: dict[str, Any] = {"type": kind, "message": str(error.detail), "request_id": request_id}
    if path.endswith(OPENAI_PATH):
        openai_type = OPENAI_ERROR_TYPES.get(error.status_code, "invalid_request_error")
        body |= {"type": openai_type, "code": kind, "param": getattr(error, "param", None)}
    return {"error": body}


def error_response(error: HTTPException, request_id: str, path: str) -> JSONResponse:
    """Return the HTTP response of an error on the route of a path."""
    headers = {**(error.headers or {}), "X-Request-Id": request_id}
    return JSONResponse(error_body(error, request_id, path), error.status_code, headers)


def add_exception_handlers(api: FastAPI) -> None:
    """Make the application return every error as an `ErrorResponse`."""

    def respond(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(error, request.state.request_id, request.url.path)

    @api.exception_handler(HTTPException)
    async def handle_http_exception(request: Request, error: HTTPException) -> JSONResponse:
        return respond(request, error)

    @api.exception_handler(RequestValidationError)
    async def handle_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        problems = error.errors()
        return respond(request, ApiError(400, describe_problems(problems), param=_location(problems[0])))

    @api.exception_handler(Exception)
    async def handle_bug(request: Request, _: Exception) -> JSONResponse:
        return respond(request, ApiError(500, UNEXPECTED_ERROR))


def describe_problems(problems: Sequence[Mapping[str, Any]]) -> str:
    """Describe the first validation errors of pydantic in one sentence."""
    return "; ".join(_describe(problem) for problem in problems[:5]) + "."


def _describe(problem: Mapping[str, Any]) -> str:
    """Describe a validation error without the value, which may be a photo."""
    return f"{_location(problem) or 'body'}: {problem['msg']}"[:300]


def _location(problem: Mapping[str, Any]) -> str | None:
    """Return the name of the field of a validation error, or None for the body as a whole."""
    return ".".join(str(part) for part in problem["loc"] if part != "body")[:100] or None
