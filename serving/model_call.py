"""Model calls of the /v1 API: finds the model, runs it in a thread, records the call, and streams its answers."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from typing import Any, Protocol, cast

import numpy as np
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from inference import registry
from inference.availability import unavailable
from inference.metering import UsageMeter
from inference.registry import MODELS
from inference.types import (
    MAX_SEED,
    SKILLS,
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
from serving.disconnect import cancel_on_disconnect
from serving.errors import UNEXPECTED_ERROR, ApiError, from_inference_error
from serving.request_slots import RequestSlots
from serving.schemas import SamplingSettings
from usage.events import UsageEvent

DEFAULT_MODEL = "moondream-tiny"
UNKNOWN_MODEL = "There is no model called {!r}. GET /v1/models lists the available models."
MODEL_PREFIX = "moondream/"  # optional, as on Moondream Cloud
CHECKPOINT_NAME = re.compile(r"[\w.-]+/[0-9a-f]{26}@\d{1,9}")  # <base>/<finetune id>@<step>
# Documentation of a stream: the schema of one of its events.
EVENT_SCHEMA = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
STREAM_RESPONSES: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": EVENT_SCHEMA}}}}
_log = logging.getLogger(__name__)


def available_models() -> dict[str, ModelSpec]:
    """Return the local models, including tuned runs. Hosted models are excluded: their API keys are not shared."""
    return {name: spec for name, spec in MODELS.items() if spec.backend != "hosted" and unavailable(spec) is None}


class StreamFormat(Protocol):
    """Formats the answers of a call as server-sent events."""

    def text(self, answer: Answer) -> str:
        """Return the complete text of an answer, which continues the text of the updates before it."""
        ...

    def update(self, index: int, chunk: str) -> str:
        """Return the event of the next part of a candidate's text."""
        ...

    def end(self, answers: Sequence[Answer]) -> Iterator[str]:
        """Yield the last events of a complete stream."""
        ...

    def failure(self, error: ApiError) -> Iterator[str]:
        """Yield the last events of a stream that fails after its beginning."""
        ...


class Dispatcher:
    """Runs model calls in threads, limits their number, and records each."""

    def __init__(self, meter: UsageMeter, max_requests: int, tuning_service: tuning.TuningService) -> None:
        self.meter, self.tuning_service = meter, tuning_service
        self.slots = RequestSlots(max_requests)

    async def find_model(self, name: str | None, http_request: HttpRequest) -> ModelSpec:
        """Return the requested model, which may be a checkpoint of the tenant. Raises ApiError (404, 503)."""
        find = partial(self.model_of, http_request.state.tenant, name)
        if name and name.removeprefix(MODEL_PREFIX) not in MODELS and CHECKPOINT_NAME.fullmatch(name):
            return await self.slots.run(find)  # in a thread, since the first checkpoint imports torch
        return find()

    def model_of(self, tenant: str, name: str | None) -> ModelSpec:
        """Return the model of a tenant and a name. Raises ApiError (404, 503)."""
        name = (name or DEFAULT_MODEL).removeprefix(MODEL_PREFIX)
        spec = MODELS.get(name)
        if spec is None and CHECKPOINT_NAME.fullmatch(name):
            return self.tuning_service.checkpoint_spec(tenant, name)
        if spec is None or spec.backend == "hosted":
            raise ApiError(404, UNKNOWN_MODEL.format(name[:100]), param="model")
        return spec

    def call(
        self,
        http_request: HttpRequest,
        spec: ModelSpec,
        skill: str,
        photo: Callable[[], np.ndarray],
        settings: SamplingSettings | None,
        **fields: Any,
    ) -> ModelCall:
        """Create a model call.

        Args:
            http_request: The HTTP request.
            spec: The model.
            skill: Key in `SKILLS`.
            photo: Decodes the photo, uint8 [height, width, 3]. Raises ApiError.
            settings: The sampling settings.
            **fields: Further fields of the inference request.
        """
        sampling = settings or SamplingSettings()

        def create_request() -> Request:
            try:
                return sampled_request(photo(), skill, sampling, **fields)
            except RequestError as error:
                raise ApiError(400, str(error)) from None

        return ModelCall(self, http_request, sampled_spec(spec, sampling), skill, create_request)


def sampled_request(photo: np.ndarray, skill: str, sampling: SamplingSettings, **fields: Any) -> Request:
    """Return the inference request with an API request's sampling settings. Raises RequestError."""
    return Request(
        photo,
        skill,
        **fields,
        temperature=sampling.temperature,
        seed=secrets.randbelow(MAX_SEED) if sampling.seed is None else sampling.seed,
        max_tokens=sampling.max_tokens,
        max_objects=sampling.max_objects,
    )


def sampled_spec(spec: ModelSpec, sampling: SamplingSettings) -> ModelSpec:
    """Return a model that is sampled exactly as an API request says, without the model's own defaults."""
    return replace(spec, temperature=1.0, top_p=sampling.top_p)


class ModelCall:
    """A model call and its HTTP response.

    One thread runs the model from its start to its end and records the usage event: "ok" once the answers are complete,
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
        self.start = time.perf_counter()

    async def response(self, body: Callable[[Sequence[Answer]], dict[str, Any]]) -> Response:
        """Return the complete answers as JSON. `body` creates the body from the answers, in order of their indices."""
        work = self._start(lambda event: None)
        async with cancel_on_disconnect(self.http_request, self.cancel):
            answers = await work
        if isinstance(answers, ApiError):
            raise answers
        headers = {"X-Request-Id": self.id, "Server-Timing": server_timing(answers, time.perf_counter() - self.start)}
        return JSONResponse(body(answers), headers=headers)

    async def stream(self, stream_format: StreamFormat) -> Response:
        """Return the answers as server-sent events. An error before the first event is an ordinary error response."""
        updates: asyncio.Queue[TextUpdate | None] = asyncio.Queue()  # None marks the end
        work = self._start(partial(asyncio.get_running_loop().call_soon_threadsafe, updates.put_nowait))
        work.add_done_callback(lambda _: updates.put_nowait(None))
        async with cancel_on_disconnect(self.http_request, self.cancel):
            first = await updates.get()
        if first is None and isinstance(error := work.result(), ApiError):
            raise error
        events = self._events(stream_format, first, updates, work)
        return EventStream(events, self.cancel, {"X-Request-Id": self.id})

    def _start(self, emit: Callable[[TextUpdate], object]) -> asyncio.Task[list[Answer] | ApiError]:
        """Start the thread; see `_run`. The task raises ApiError (503) if too many requests are waiting."""
        return asyncio.create_task(self.dispatcher.slots.run(partial(self._run, emit)))

    async def _events(
        self,
        stream_format: StreamFormat,
        update: TextUpdate | None,
        updates: asyncio.Queue[TextUpdate | None],
        work: asyncio.Task[list[Answer] | ApiError],
    ) -> AsyncIterator[str]:
        sent: dict[int, str] = {}

        def next_event(index: int, text: str) -> str | None:
            chunk, sent[index] = text[len(sent.get(index, "")) :], text
            return stream_format.update(index, chunk) if chunk else None

        while update is not None:
            if event := next_event(update.index, update.text):
                yield event
            update = await updates.get()
        result = work.result()
        if isinstance(result, ApiError):
            for event in stream_format.failure(result):
                yield event
            return
        for answer in result:
            if event := next_event(answer.index, stream_format.text(answer)):
                yield event
        for event in stream_format.end(result):
            yield event

    def _run(self, emit: Callable[[TextUpdate], object]) -> list[Answer] | ApiError:
        """Run the model to its end and record the call.

        Args:
            emit: Receives the text so far of a candidate, at each update.
        """
        try:
            request = self._create_request()
        except ApiError as error:
            return error
        answers: dict[int, Answer] = {}
        has_text = SKILLS[self.skill].output != "regions"
        message = "The model returned no answer. Try again."
        try:
            meter = self.dispatcher.meter
            events = meter.answer(self.spec.name, request, self.cancel, self._answer, "v1", self.id)
            with closing(cast("Generator[AnswerEvent]", events)):  # a closed call is recorded at once
                for event in events:
                    if isinstance(event, TextUpdate) and has_text:
                        emit(replace(event, text=_without_stop(request, event.text)))
                    elif isinstance(event, Answer):
                        text, stopped = request.cut_at_stop(event.text)
                        answers[event.index] = replace(event, text=text, truncated=event.truncated and not stopped)
                    elif isinstance(event, CandidateFailed):
                        message = event.message
                    if self.cancel.is_set() and len(answers) < request.n:
                        break
        except InferenceError as error:
            return from_inference_error(error)
        except Exception:  # the thread's last line of defence: a stream has no other way to report it
            _log.exception("Model %s failed", self.spec.name)
            return ApiError(500, UNEXPECTED_ERROR)
        if len(answers) < request.n:
            return ApiError(500, message)
        return [answers[index] for index in sorted(answers)]

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


def _without_stop(request: Request, text: str) -> str:
    """Return an incomplete text without a stop text, and without an end that may be the beginning of one."""
    text, stopped = request.cut_at_stop(text)
    if stopped:
        return text
    lengths = (length for stop in request.stop for length in range(1, len(stop)) if text.endswith(stop[:length]))
    return text[: len(text) - max(lengths, default=0)].rstrip() if request.stop else text


def server_timing(answers: Sequence[Answer], seconds: float) -> str:
    """Return the header Server-Timing of a complete call: its phases and its total time, in milliseconds."""
    prefill = min(answer.first_token_seconds for answer in answers)
    decode = max(0.0, max(answer.seconds for answer in answers) - prefill)
    waited = answers[0].queue_seconds + (answers[0].cold_start_seconds or 0.0)
    phases = {"queue": waited, "prefill": prefill, "decode": decode, "total": seconds}
    return ", ".join(f"{name};dur={1000 * value:.1f}" for name, value in phases.items())


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


def sse(**fields: Any) -> str:
    """Format a server-sent event."""
    return f"data: {json.dumps(fields)}\n\n"
