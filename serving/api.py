"""The /v1 API: query, caption, detect, point and models, wire-compatible with Moondream Cloud."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, cast

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from inference import registry
from inference.availability import unavailable
from inference.metering import UsageMeter
from inference.registry import MODELS
from inference.types import (
    MAX_SEED,
    RECIPE_QUESTION,
    Answer,
    AnswerEvent,
    CandidateFailed,
    InferenceError,
    ModelSpec,
    Request,
    RequestError,
    TextUpdate,
)
from serving import tuning
from serving.auth import ApiKeyAuth
from serving.disconnect import cancel_on_disconnect
from serving.errors import (
    UNEXPECTED_ERROR,
    ApiError,
    ErrorResponse,
    add_exception_handlers,
    error_body,
    from_inference_error,
)
from serving.json_body import JsonRoute
from serving.middleware import RequestGuard
from serving.request_slots import RequestSlots
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
from usage.events import UsageEvent

DEFAULT_MODEL = "moondream-tiny"
CHECKPOINT_NAME = re.compile(r"[\w.-]+/[0-9a-f]{26}@\d{1,9}")  # <base>/<finetune id>@<step>
MAX_REQUESTS = 64  # running and waiting; further requests are rejected
TITLE = "Moondream Playground API"
DESCRIPTION = (
    "Wire-compatible with Moondream Cloud's query, caption, detect and point. Every error is an ErrorResponse."
)
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 402, 403, 404, 408, 409, 413, 429, 500, 503)
}
STREAM_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
}
_log = logging.getLogger(__name__)


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
    api.router.route_class = JsonRoute
    tuning_service = tuning.TuningService(folder, meter)
    api.include_router(tuning.router(tuning_service))
    dispatcher = Dispatcher(meter, max_requests, tuning_service)

    @api.get("/models")
    async def models() -> ModelList:
        cards = [
            ModelCard(id=name, name=spec.title, description=spec.note) for name, spec in available_models().items()
        ]
        return ModelList(data=sorted(cards, key=lambda card: card.id != DEFAULT_MODEL))

    @api.post("/query", response_model=QueryResponse, responses=STREAM_RESPONSES)
    async def query(body: QueryRequest, http_request: HttpRequest) -> Response:
        spec = await dispatcher.find_model(body, http_request)
        skill = "recipe" if spec.grammar_constrained and body.question == RECIPE_QUESTION else "query"
        call = dispatcher.call(http_request, spec, body, skill, prompt=body.question)
        return await (call.stream() if body.stream else call.response(lambda answer: {"answer": answer.text}))

    @api.post("/caption", response_model=CaptionResponse, responses=STREAM_RESPONSES)
    async def caption(body: CaptionRequest, http_request: HttpRequest) -> Response:
        spec = await dispatcher.find_model(body, http_request)
        call = dispatcher.call(http_request, spec, body, "caption", length=body.length)
        return await (call.stream() if body.stream else call.response(lambda answer: {"caption": answer.text}))

    @api.post("/detect", response_model=DetectResponse)
    async def detect(body: RegionRequest, http_request: HttpRequest) -> Response:
        spec = await dispatcher.find_model(body, http_request)
        call = dispatcher.call(http_request, spec, body, "detect", prompt=body.object)
        return await call.response(lambda answer: {"objects": [asdict(box) for box in answer.boxes]})

    @api.post("/point", response_model=PointResponse)
    async def point(body: RegionRequest, http_request: HttpRequest) -> Response:
        spec = await dispatcher.find_model(body, http_request)
        call = dispatcher.call(http_request, spec, body, "point", prompt=body.object)
        return await call.response(lambda answer: {"points": [asdict(point) for point in answer.points]})

    return api


def available_models() -> dict[str, ModelSpec]:
    """Return the local models, including tuned runs. Hosted models are excluded: their API keys are not shared."""
    return {name: spec for name, spec in MODELS.items() if spec.backend != "hosted" and unavailable(spec) is None}


class Dispatcher:
    """Runs model calls in threads, limits their number, and records each."""

    def __init__(self, meter: UsageMeter, max_requests: int, tuning_service: tuning.TuningService) -> None:
        self.meter, self.tuning_service = meter, tuning_service
        self.slots = RequestSlots(max_requests)

    async def find_model(self, body: ApiRequest, http_request: HttpRequest) -> ModelSpec:
        """Return the requested model, which may be a checkpoint of the tenant. Raises ApiError (404, 503)."""
        name = body.model or DEFAULT_MODEL
        spec = MODELS.get(name)
        if spec is None and CHECKPOINT_NAME.fullmatch(name):
            find = partial(self.tuning_service.checkpoint_spec, http_request.state.tenant, name)
            return await self.slots.run(find)  # in a thread, since the first checkpoint imports torch
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
        """
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

        spec = replace(spec, temperature=1.0, top_p=sampling.top_p)
        return ModelCall(self, http_request, spec, skill, create_request)


class ModelCall:
    """A model call and its HTTP response.

    One thread runs the model from its start to its end and records the usage event: "ok" once the answer is complete,
    "cancelled" if the client disconnects before, "error" otherwise.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        http_request: HttpRequest,
        spec: ModelSpec,
        skill: str,
        create_request: Callable[[], Request],
    ) -> None:
        self.dispatcher, self.http_request, self.spec, self.skill = dispatcher, http_request, spec, skill
        self.create_request = create_request  # decodes the photo, so it runs in the thread
        self.id: str = http_request.state.request_id
        self.cancel = threading.Event()

    async def response(self, answer_fields: Callable[[Answer], dict[str, Any]]) -> Response:
        """Return the complete answer as JSON. `answer_fields` returns the fields of the skill."""
        work = self._start(lambda text: None)
        async with cancel_on_disconnect(self.http_request, self.cancel):
            answer = await work
        if isinstance(answer, ApiError):
            raise answer
        body = response_fields(answer, self.spec.name, self.id) | answer_fields(answer)
        return JSONResponse(body, headers={"X-Request-Id": self.id})

    async def stream(self) -> Response:
        """Return the answer as server-sent events. An error before the first text is an ordinary error response."""
        texts: asyncio.Queue[str | None] = asyncio.Queue()  # None marks the end
        work = self._start(partial(asyncio.get_running_loop().call_soon_threadsafe, texts.put_nowait))
        work.add_done_callback(lambda _: texts.put_nowait(None))
        async with cancel_on_disconnect(self.http_request, self.cancel):
            first = await texts.get()
        if first is None and isinstance(error := work.result(), ApiError):
            raise error
        return EventStream(self._events(first, texts, work), self.cancel, {"X-Request-Id": self.id})

    def _start(self, emit: Callable[[str], object]) -> asyncio.Task[Answer | ApiError]:
        """Start the thread; see `_run`. The task raises ApiError (503) if too many requests are waiting."""
        return asyncio.create_task(self.dispatcher.slots.run(partial(self._run, emit)))

    async def _events(
        self, text: str | None, texts: asyncio.Queue[str | None], work: asyncio.Task[Answer | ApiError]
    ) -> AsyncIterator[str]:
        sent = ""
        while text is not None:
            chunk, sent = text[len(sent) :], text
            if chunk:
                yield _sse(chunk=chunk, completed=False, request_id=self.id)
            text = await texts.get()
        result = work.result()
        if isinstance(result, Answer):
            yield _sse(chunk=result.text[len(sent) :], completed=False, request_id=self.id)
            yield _sse(chunk="", completed=True, **response_fields(result, self.spec.name, self.id))
        else:
            yield _sse(chunk="", completed=True, **error_body(result.status_code, str(result.detail), self.id))

    def _run(self, emit: Callable[[str], object]) -> Answer | ApiError:
        """Run the model to its end and record the call.

        Args:
            emit: Receives the text so far, at each update.
        """
        try:
            request = self._create_request()
        except ApiError as error:
            return error
        answer: Answer | None = None
        message = "The model returned no answer. Try again."
        try:
            meter = self.dispatcher.meter
            events = meter.answer(self.spec.name, request, self.cancel, self._answer, "v1", self.id)
            with closing(cast("Generator[AnswerEvent]", events)):  # a closed call is recorded at once
                for event in events:
                    if isinstance(event, TextUpdate):
                        emit(event.text)
                    elif isinstance(event, Answer):
                        answer = event
                    elif isinstance(event, CandidateFailed):
                        message = event.message
                    if self.cancel.is_set() and answer is None:
                        break
        except InferenceError as error:
            return from_inference_error(error)
        except Exception:  # the thread's last line of defence: a stream has no other way to report it
            _log.exception("Model %s failed", self.spec.name)
            return ApiError(500, UNEXPECTED_ERROR)
        return answer or ApiError(500, message)

    def _create_request(self) -> Request:
        """Decode the photo. Records the call and raises ApiError (400) if that fails."""
        start = time.perf_counter()
        try:
            return self.create_request()
        except ApiError:
            recorder = self.dispatcher.meter.recorder
            recorder.record(
                UsageEvent(
                    datetime.now(timezone.utc),
                    self.spec.name,
                    self.skill,
                    outcome="error",
                    error="invalid_photo",
                    latency=time.perf_counter() - start,
                    source="v1",
                    request_id=self.id,
                ).with_deployment(recorder.deployment)
            )
            raise

    def _answer(self, name: str, request: Request, cancel: threading.Event) -> Iterator[AnswerEvent]:
        """Run the model with this call's sampling settings."""
        return registry.answer(self.spec, request, cancel)


class EventStream(StreamingResponse):
    """Server-sent events. Sets `cancel` at the end, even if the client disconnects before the first event is sent."""

    def __init__(self, events: AsyncIterator[str], cancel: threading.Event, headers: dict[str, str]) -> None:
        """Create the response.

        Args:
            events: The formatted events.
            cancel: Set to cancel the computation of the events.
            headers: Further headers.
        """
        headers = {**headers, "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.cancel = cancel

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.cancel.set()


def _sse(**fields: Any) -> str:
    """Format a server-sent event."""
    return f"data: {json.dumps(fields)}\n\n"
