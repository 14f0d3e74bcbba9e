"""This deployment as a Moondream endpoint: /v1/query, caption, detect, point and models, as on Moondream Cloud."""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI
from fastapi import Request as Http
from fastapi.responses import JSONResponse, Response, StreamingResponse

from inference.metering import UsageMeter
from inference.registry import MODELS, ModelSpec
from inference.registry import answer as ask_model
from inference.types import MAX_SEED, RECIPE_QUESTION, Answer, Event, InferenceError, Request, RequestError, TextUpdate
from serving import errors
from serving import schemas as wire
from serving.auth import ApiKeyAuth
from serving.errors import ApiError, ErrorResponse, of_inference, trouble
from serving.middleware import RequestGuard
from serving.tuning import TuningService
from serving.tuning import router as tuning

DEFAULT = "moondream-tiny"
CHECKPOINT = re.compile(r"[\w.-]+/[0-9a-f]{26}@\d{1,9}")  # of a finetune: <base>/<id>@<step>
MAX_WAITING = 64  # requests that compute or wait; more are sent away
TITLE = "Moondream Playground API"
ABOUT = "Wire-compatible with Moondream Cloud's query, caption, detect and point. Every error is an ErrorAnswer."
FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 402, 404, 408, 409, 413, 429, 500, 503)
}
STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


def create(metering: UsageMeter, keys: ApiKeyAuth, folder: Path, max_waiting: int = MAX_WAITING) -> FastAPI:
    """The API as an application of its own, to be mounted at /v1; its schema is openapi.json beside the skills.

    folder: where finetunes are kept.
    """
    api = FastAPI(title=TITLE, description=ABOUT, docs_url=None, redoc_url=None, responses=FAILURES)
    errors.install(api)
    api.add_middleware(RequestGuard, keys=keys)
    bench = TuningService(folder)
    api.include_router(tuning(bench))
    desk = Dispatcher(metering, CapacityLimiter(max_waiting), bench)

    @api.get("/models")
    async def models() -> wire.ModelList:
        offered = [wire.ModelCard(id=name, name=e.title, description=e.note) for name, e in served().items()]
        return wire.ModelList(data=sorted(offered, key=lambda card: card.id != DEFAULT))

    @api.post("/query", response_model=wire.QueryAnswer, responses=STREAM)
    async def query(asked: wire.QueryRequest, http: Http) -> Response:
        entry = desk.entry_of(asked, http)
        recipe = entry.grammar_constrained and asked.question == RECIPE_QUESTION
        call = desk.call(http, entry, asked, "recipe" if recipe else "query", prompt=asked.question)
        return await (call.streamed() if asked.stream else call.whole(lambda found: {"answer": found.text}))

    @api.post("/caption", response_model=wire.CaptionAnswer, responses=STREAM)
    async def caption(asked: wire.CaptionRequest, http: Http) -> Response:
        call = desk.call(http, desk.entry_of(asked, http), asked, "caption", length=asked.length)
        return await (call.streamed() if asked.stream else call.whole(lambda found: {"caption": found.text}))

    @api.post("/detect", response_model=wire.DetectAnswer)
    async def detect(asked: wire.RegionRequest, http: Http) -> Response:
        call = desk.call(http, desk.entry_of(asked, http), asked, "detect", prompt=asked.object)
        return await call.whole(lambda found: {"objects": [_named(wire.Region, box) for box in found.boxes]})

    @api.post("/point", response_model=wire.PointAnswer)
    async def point(asked: wire.RegionRequest, http: Http) -> Response:
        call = desk.call(http, desk.entry_of(asked, http), asked, "point", prompt=asked.object)
        return await call.whole(lambda found: {"points": [_named(wire.PointModel, spot) for spot in found.points]})

    return api


def served() -> dict[str, ModelSpec]:
    """The models that this API gives: those that compute here, tuned runs among them. Others' keys are not lent."""
    return {name: e for name, e in MODELS.items() if e.backend != "hosted" and e.unavailable() is None}


def _named(kind: type[Any], value: Any) -> dict[str, float]:
    return dict(zip(kind.model_fields, astuple(value)))


class Dispatcher:
    """Takes the calls, so many at once, and has each recorded."""

    def __init__(self, metering: UsageMeter, limiter: CapacityLimiter, bench: TuningService) -> None:
        self.metering, self.limiter, self.bench = metering, limiter, bench

    def entry_of(self, asked: wire.ApiRequest, http: Http) -> ModelSpec:
        """The model that is asked, as it is called; of a tenant's own finetunes, too. Raises ApiError (404)."""
        name = asked.model or DEFAULT
        entry = MODELS.get(name)
        if entry is None and CHECKPOINT.fullmatch(name):
            return self.bench.checkpoint(http.state.tenant, name)
        if entry is None or entry.backend == "hosted":
            raise ApiError(404, f"There is no model called {name[:100]!r} here. GET /v1/models lists those there are.")
        return entry

    def call(self, http: Http, entry: ModelSpec, asked: wire.ApiRequest, skill: str, **words: Any) -> _Call:
        """A call that is to be answered. Raises ApiError where too many wait."""
        if self.limiter.available_tokens < 1:
            raise ApiError(503, "Too many requests wait here. Try again in a few seconds.", {"Retry-After": "2"})
        sampling = asked.settings or wire.Sampling()
        seed = secrets.randbelow(MAX_SEED) if sampling.seed is None else sampling.seed

        def request() -> Request:
            try:
                return Request(
                    asked.photo(),
                    skill,
                    **words,
                    temperature=sampling.temperature,
                    seed=seed,
                    max_tokens=sampling.max_tokens,
                    max_objects=sampling.max_objects,
                )
            except RequestError as error:
                raise ApiError(400, str(error)) from None

        exactly = replace(entry, temperature=1.0, top_p=sampling.top_p)
        return _Call(self, http, exactly, request)


class _Call:
    """One request on its way to its answer, computed in threads; it stops when nobody listens any more."""

    def __init__(self, desk: Dispatcher, http: Http, entry: ModelSpec, request: Callable[[], Request]) -> None:
        self.desk, self.http, self.entry, self.request = desk, http, entry, request
        self.id: str = http.state.request_id
        self.cancel = threading.Event()

    async def whole(self, fields: Callable[[Answer], dict[str, Any]]) -> Response:
        """The answer in one piece."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._watch)
            found = await self._in_thread(self._last)
            group.cancel_scope.cancel()
        if isinstance(found, ApiError):
            raise found
        told = wire.common(found, self.entry.name, self.id)
        body = told | {"metrics": told["metrics"].model_dump()} | fields(found)
        return JSONResponse(body, headers={"X-Request-Id": self.id})

    async def streamed(self) -> Response:
        """The answer as server-sent events. What fails before the first word is an ordinary error."""
        events = self._events()
        first = await self._in_thread(partial(self._next, events))
        if isinstance(first, ApiError):
            raise first
        headers = {"X-Request-Id": self.id, "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(self._stream(first, events), media_type="text/event-stream", headers=headers)

    async def _stream(
        self, event: TextUpdate | Answer | ApiError | None, events: Iterator[Event]
    ) -> AsyncIterator[str]:
        told = ""
        try:
            while isinstance(event, TextUpdate):
                piece, told = event.text[len(told) :], event.text
                if piece:
                    yield _line(chunk=piece, completed=False, request_id=self.id)
                event = await self._in_thread(partial(self._next, events))
            if isinstance(event, Answer):
                yield _line(chunk=event.text[len(told) :], completed=False, request_id=self.id)
                last = wire.common(event, self.entry.name, self.id)
                yield _line(chunk="", completed=True, **last | {"metrics": last["metrics"].model_dump()})
            else:
                error = event or ApiError(500, "The model gave no answer.")
                yield _line(chunk="", completed=True, **trouble(error.status_code, str(error.detail), self.id))
        finally:
            self.cancel.set()

    async def _watch(self) -> None:
        """Until the caller goes away."""
        while (await self.http.receive())["type"] != "http.disconnect":
            pass
        self.cancel.set()

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        return await to_thread.run_sync(work, limiter=self.desk.limiter, abandon_on_cancel=True)

    def _events(self) -> Iterator[Event]:
        """Asks the model, and has the call recorded."""
        request, metering = self.request(), self.desk.metering

        def ask(name: str, request: Request, cancel: threading.Event) -> Iterator[Event]:
            return ask_model(self.entry, request, cancel)

        yield from metering.ask(self.entry.name, request, self.cancel, ask, "v1", self.id)

    def _next(self, events: Iterator[Event]) -> TextUpdate | Answer | ApiError | None:
        try:
            return next((event for event in events if isinstance(event, TextUpdate | Answer)), None)
        except InferenceError as error:
            return of_inference(error)
        except ApiError as error:
            return error

    def _last(self) -> Answer | ApiError:
        events, found = self._events(), None
        while isinstance(found := self._next(events), TextUpdate):
            pass
        return found or ApiError(500, "The model gave no answer.")


def _line(**fields: Any) -> str:
    return f"data: {json.dumps(fields)}\n\n"
