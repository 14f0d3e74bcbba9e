"""The /v1 API: query, caption, detect, point and models, wire-compatible with Moondream Cloud."""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse

from inference import registry
from inference.availability import unavailable
from inference.metering import UsageMeter
from inference.registry import MODELS
from inference.types import (
    MAX_SEED,
    RECIPE_QUESTION,
    Answer,
    AnswerEvent,
    InferenceError,
    ModelSpec,
    Request,
    RequestError,
    TextUpdate,
)
from serving import tuning
from serving.auth import ApiKeyAuth
from serving.errors import ApiError, ErrorResponse, add_exception_handlers, error_body, from_inference_error
from serving.middleware import RequestGuard
from serving.schemas import (
    ApiRequest,
    CaptionRequest,
    CaptionResponse,
    DetectResponse,
    ModelCard,
    ModelList,
    PointResponse,
    QueryRequest,
    QueryResponse,
    RegionRequest,
    SamplingSettings,
    response_fields,
)

DEFAULT_MODEL = "moondream-tiny"
CHECKPOINT_NAME = re.compile(r"[\w.-]+/[0-9a-f]{26}@\d{1,9}")  # <base>/<finetune id>@<step>
MAX_REQUESTS = 64  # running and waiting; further requests are rejected
TITLE = "Moondream Playground API"
DESCRIPTION = (
    "Wire-compatible with Moondream Cloud's query, caption, detect and point. Every error is an ErrorResponse."
)
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 402, 404, 408, 409, 413, 429, 500, 503)
}
STREAM_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
}


def create_api(meter: UsageMeter, auth: ApiKeyAuth, folder: Path, max_requests: int = MAX_REQUESTS) -> FastAPI:
    """Create the API, to be mounted at /v1.

    Args:
        meter: Records every model call.
        auth: Authenticates requests.
        folder: Folder of the finetunes.
        max_requests: Maximum number of running and waiting requests.
    """
    api = FastAPI(title=TITLE, description=DESCRIPTION, docs_url=None, redoc_url=None, responses=ERROR_RESPONSES)
    add_exception_handlers(api)
    api.add_middleware(RequestGuard, auth=auth)
    tuning_service = tuning.TuningService(folder)
    api.include_router(tuning.router(tuning_service))
    dispatcher = Dispatcher(meter, CapacityLimiter(max_requests), tuning_service)

    @api.get("/models")
    async def models() -> ModelList:
        cards = [
            ModelCard(id=name, name=spec.title, description=spec.note) for name, spec in available_models().items()
        ]
        return ModelList(data=sorted(cards, key=lambda card: card.id != DEFAULT_MODEL))

    @api.post("/query", response_model=QueryResponse, responses=STREAM_RESPONSES)
    async def query(body: QueryRequest, http_request: HttpRequest) -> Response:
        spec = dispatcher.find_model(body, http_request)
        skill = "recipe" if spec.grammar_constrained and body.question == RECIPE_QUESTION else "query"
        call = dispatcher.call(http_request, spec, body, skill, prompt=body.question)
        return await (call.stream() if body.stream else call.response(lambda answer: {"answer": answer.text}))

    @api.post("/caption", response_model=CaptionResponse, responses=STREAM_RESPONSES)
    async def caption(body: CaptionRequest, http_request: HttpRequest) -> Response:
        spec = dispatcher.find_model(body, http_request)
        call = dispatcher.call(http_request, spec, body, "caption", length=body.length)
        return await (call.stream() if body.stream else call.response(lambda answer: {"caption": answer.text}))

    @api.post("/detect", response_model=DetectResponse)
    async def detect(body: RegionRequest, http_request: HttpRequest) -> Response:
        spec = dispatcher.find_model(body, http_request)
        call = dispatcher.call(http_request, spec, body, "detect", prompt=body.object)
        return await call.response(lambda answer: {"objects": [asdict(box) for box in answer.boxes]})

    @api.post("/point", response_model=PointResponse)
    async def point(body: RegionRequest, http_request: HttpRequest) -> Response:
        spec = dispatcher.find_model(body, http_request)
        call = dispatcher.call(http_request, spec, body, "point", prompt=body.object)
        return await call.response(lambda answer: {"points": [asdict(point) for point in answer.points]})

    return api


def available_models() -> dict[str, ModelSpec]:
    """Return the local models, including tuned runs. Hosted models are excluded: their API keys are not shared."""
    return {name: spec for name, spec in MODELS.items() if spec.backend != "hosted" and unavailable(spec) is None}


class Dispatcher:
    """Runs model calls in threads, limits their number, and records each."""

    def __init__(self, meter: UsageMeter, limiter: CapacityLimiter, tuning_service: tuning.TuningService) -> None:
        self.meter, self.limiter, self.tuning_service = meter, limiter, tuning_service

    def find_model(self, body: ApiRequest, http_request: HttpRequest) -> ModelSpec:
        """Return the requested model, which may be a checkpoint of the tenant. Raises ApiError (404)."""
        name = body.model or DEFAULT_MODEL
        spec = MODELS.get(name)
        if spec is None and CHECKPOINT_NAME.fullmatch(name):
            return self.tuning_service.checkpoint_spec(http_request.state.tenant, name)
        if spec is None or spec.backend == "hosted":
            raise ApiError(404, f"There is no model called {name[:100]!r}. GET /v1/models lists the available models.")
        return spec

    def call(
        self, http_request: HttpRequest, spec: ModelSpec, body: ApiRequest, skill: str, **fields: Any
    ) -> ModelCall:
        """Create a model call.

        Args:
            http_request: The HTTP request.
            spec: The model.
            body: The request's body.
            skill: Key in `SKILLS`.
            **fields: `prompt` or `length` of the inference request.

        Raises:
            ApiError: Too many requests are waiting (503).
        """
        if self.limiter.available_tokens < 1:
            raise ApiError(503, "Too many requests are waiting. Try again in a few seconds.", {"Retry-After": "2"})
        sampling = body.settings or SamplingSettings()
        seed = secrets.randbelow(MAX_SEED) if sampling.seed is None else sampling.seed

        def create_request() -> Request:
            try:
                return Request(
                    body.photo(),
                    skill,
                    **fields,
                    temperature=sampling.temperature,
                    seed=seed,
                    max_tokens=sampling.max_tokens,
                    max_objects=sampling.max_objects,
                )
            except RequestError as error:
                raise ApiError(400, str(error)) from None

        return ModelCall(self, http_request, replace(spec, temperature=1.0, top_p=sampling.top_p), create_request)


class ModelCall:
    """A model call and its HTTP response. The call is cancelled when the client disconnects."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        http_request: HttpRequest,
        spec: ModelSpec,
        create_request: Callable[[], Request],
    ) -> None:
        self.dispatcher, self.http_request, self.spec = dispatcher, http_request, spec
        self.create_request = create_request  # decodes the photo, so it runs in a thread
        self.id: str = http_request.state.request_id
        self.cancel = threading.Event()

    async def response(self, answer_fields: Callable[[Answer], dict[str, Any]]) -> Response:
        """Return the complete answer as JSON. `answer_fields` returns the fields of the skill."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._cancel_on_disconnect)
            answer = await self._in_thread(self._complete)
            group.cancel_scope.cancel()
        if isinstance(answer, ApiError):
            raise answer
        body = response_fields(answer, self.spec.name, self.id) | answer_fields(answer)
        return JSONResponse(body, headers={"X-Request-Id": self.id})

    async def stream(self) -> Response:
        """Return the answer as server-sent events. An error before the first text is an ordinary error response."""
        events = self._events()
        first = await self._in_thread(partial(self._next, events))
        if isinstance(first, ApiError):
            raise first
        headers = {"X-Request-Id": self.id, "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(self._stream(first, events), media_type="text/event-stream", headers=headers)

    async def _stream(
        self, event: TextUpdate | Answer | ApiError | None, events: Iterator[AnswerEvent]
    ) -> AsyncIterator[str]:
        sent = ""
        try:
            while isinstance(event, TextUpdate):
                chunk, sent = event.text[len(sent) :], event.text
                if chunk:
                    yield _sse(chunk=chunk, completed=False, request_id=self.id)
                event = await self._in_thread(partial(self._next, events))
            if isinstance(event, Answer):
                yield _sse(chunk=event.text[len(sent) :], completed=False, request_id=self.id)
                yield _sse(chunk="", completed=True, **response_fields(event, self.spec.name, self.id))
            else:
                error = event or ApiError(500, "The model returned no answer.")
                yield _sse(chunk="", completed=True, **error_body(error.status_code, str(error.detail), self.id))
        finally:
            self.cancel.set()

    async def _cancel_on_disconnect(self) -> None:
        while (await self.http_request.receive())["type"] != "http.disconnect":
            pass
        self.cancel.set()

    async def _in_thread(self, function: Callable[[], Any]) -> Any:
        return await to_thread.run_sync(function, limiter=self.dispatcher.limiter, abandon_on_cancel=True)

    def _events(self) -> Iterator[AnswerEvent]:
        """Run the model and record the call."""

        def answer(name: str, request: Request, cancel: threading.Event) -> Iterator[AnswerEvent]:
            return registry.answer(self.spec, request, cancel)

        request = self.create_request()
        yield from self.dispatcher.meter.answer(self.spec.name, request, self.cancel, answer, "v1", self.id)

    def _next(self, events: Iterator[AnswerEvent]) -> TextUpdate | Answer | ApiError | None:
        """Return the next text or answer, an error, or None at the end."""
        try:
            return next((event for event in events if isinstance(event, TextUpdate | Answer)), None)
        except InferenceError as error:
            return from_inference_error(error)
        except ApiError as error:
            return error

    def _complete(self) -> Answer | ApiError:
        """Run the model to its answer."""
        events = self._events()
        while isinstance(event := self._next(events), TextUpdate):
            pass
        return event or ApiError(500, "The model returned no answer.")


def _sse(**fields: Any) -> str:
    """Format a server-sent event."""
    return f"data: {json.dumps(fields)}\n\n"
