"""The /v1 API: Moondream Cloud's skills and models, and OpenAI's chat completions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from inference.metering import UsageMeter
from inference.types import Answer, ModelSpec, skill_of_question
from serving import batch, chat, score, tuning
from serving.auth import ApiKeyAuth
from serving.errors import ApiError, ErrorResponse, add_exception_handlers, error_body
from serving.json_body import JsonRoute
from serving.middleware import RequestGuard
from serving.model_call import (
    DEFAULT_MODEL,
    STREAM_RESPONSES,
    UNKNOWN_MODEL,
    Dispatcher,
    ModelCall,
    available_models,
    sse,
)
from serving.schemas import (
    CaptionRequest,
    CaptionResponse,
    DetectResponse,
    ModelCard,
    ModelList,
    PointResponse,
    QueryRequest,
    QueryResponse,
    RegionRequest,
    SegmentRequest,
    SegmentResponse,
    caption_fields,
    detect_fields,
    point_fields,
    query_fields,
    response_fields,
    segment_fields,
)

MAX_REQUESTS = 64  # running and waiting; further requests are rejected
TITLE = "Moondream Playground API"
DESCRIPTION = (
    "Wire-compatible with Moondream Cloud's query, caption, detect, point and segment, and with OpenAI's chat "
    "completions. Every error is an ErrorResponse."
)
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 402, 403, 404, 408, 409, 413, 429, 500, 503)
}


def create_api(meter: UsageMeter, auth: ApiKeyAuth, folder: Path, max_requests: int = MAX_REQUESTS) -> FastAPI:
    """Create the API, to be mounted at /v1.

    Args:
        meter: Records every model call.
        auth: Authenticates requests.
        folder: Folder of the finetunes. Batches are in the folder `batches` beside it.
        max_requests: Maximum number of running and waiting requests.
    """
    api = FastAPI(title=TITLE, description=DESCRIPTION, docs_url=None, redoc_url=None, responses=ERROR_RESPONSES)
    add_exception_handlers(api)
    api.add_middleware(RequestGuard, auth=auth)
    api.router.route_class = JsonRoute
    tuning_service = tuning.TuningService(folder, meter)
    api.include_router(tuning.router(tuning_service))
    dispatcher = Dispatcher(meter, max_requests, tuning_service)
    api.include_router(chat.router(dispatcher))
    api.include_router(score.router(dispatcher.slots))
    api.include_router(batch.router(batch.BatchService(folder.parent / "batches", meter, dispatcher.model_of)))
    started = int(time.time())

    def card(name: str, spec: ModelSpec) -> ModelCard:
        return ModelCard(id=name, created=started, name=spec.title, description=spec.note)

    @api.get("/models")
    async def models() -> ModelList:
        cards = [card(name, spec) for name, spec in available_models().items()]
        return ModelList(data=sorted(cards, key=lambda card: card.id != DEFAULT_MODEL))

    @api.get("/models/{model:path}")
    async def model(model: str) -> ModelCard:
        spec = available_models().get(model)
        if spec is None:
            raise ApiError(404, UNKNOWN_MODEL.format(model[:100]))
        return card(model, spec)

    @api.post("/query", response_model=QueryResponse, responses=STREAM_RESPONSES)
    async def query(body: QueryRequest, http_request: HttpRequest) -> Response:
        spec = await dispatcher.find_model(body.model, http_request)
        skill, prompt = skill_of_question(body.question)
        fields = {"prompt": prompt, "spatial_refs": body.refs, "reasoning": bool(body.reasoning)}
        call = dispatcher.call(http_request, spec, skill, body.photo, body.settings, **fields)
        return await (call.stream(TextEvents(call)) if body.stream else _respond(call, query_fields))

    @api.post("/caption", response_model=CaptionResponse, responses=STREAM_RESPONSES)
    async def caption(body: CaptionRequest, http_request: HttpRequest) -> Response:
        spec = await dispatcher.find_model(body.model, http_request)
        fields = {"length": body.length, "spatial_refs": body.refs}
        call = dispatcher.call(http_request, spec, "caption", body.photo, body.settings, **fields)
        if body.stream:
            return await call.stream(TextEvents(call))
        return await _respond(call, caption_fields)

    async def find_regions(skill: str, body: RegionRequest, http_request: HttpRequest) -> ModelCall:
        spec = await dispatcher.find_model(body.model, http_request)
        fields = {"prompt": body.object, "spatial_refs": body.refs}
        return dispatcher.call(http_request, spec, skill, body.photo, body.settings, **fields)

    @api.post("/detect", response_model=DetectResponse)
    async def detect(body: RegionRequest, http_request: HttpRequest) -> Response:
        call = await find_regions("detect", body, http_request)
        return await _respond(call, detect_fields)

    @api.post("/point", response_model=PointResponse)
    async def point(body: RegionRequest, http_request: HttpRequest) -> Response:
        call = await find_regions("point", body, http_request)
        return await _respond(call, point_fields)

    @api.post("/segment", response_model=SegmentResponse, responses=STREAM_RESPONSES)
    async def segment(body: SegmentRequest, http_request: HttpRequest) -> Response:
        call = await find_regions("segment", body, http_request)
        return await (call.stream(SegmentEvents(call)) if body.stream else _respond(call, segment_fields))

    return api


async def _respond(call: ModelCall, answer_fields: Callable[[Answer], dict[str, Any]]) -> Response:
    """Return the complete answer as JSON. `answer_fields` returns the fields of the skill."""
    return await call.response(
        lambda answers: response_fields(answers[0], call.spec.name, call.id) | answer_fields(answers[0])
    )


class TextEvents:
    """Formats a text as Moondream Cloud's server-sent events."""

    def __init__(self, call: ModelCall) -> None:
        self.model, self.id = call.spec.name, call.id

    def text(self, answer: Answer) -> str:
        """Return the text of the answer."""
        return answer.text

    def update(self, index: int, chunk: str) -> str:
        """Return the event of the next part of the text."""
        return sse(chunk=chunk, completed=False, request_id=self.id)

    def end(self, answers: Sequence[Answer]) -> Iterator[str]:
        """Yield the last event, with metrics."""
        yield sse(chunk="", completed=True, **response_fields(answers[0], self.model, self.id))

    def failure(self, error: ApiError) -> Iterator[str]:
        """Yield the last event, with the error."""
        yield sse(chunk="", completed=True, **error_body(error, self.id))


class SegmentEvents(TextEvents):
    """Formats an outline as Moondream Cloud's server-sent events: the box, the coarse path, and the final path."""

    def text(self, answer: Answer) -> str:
        """Return no text: all events come at the end."""
        return ""

    def end(self, answers: Sequence[Answer]) -> Iterator[str]:
        """Yield the events of the outline."""
        fields = segment_fields(answers[0])
        yield sse(type="bbox", bbox=fields["bbox"])
        yield sse(type="path_delta", chunk=fields["path"], completed=False)
        yield sse(type="final", completed=True, **fields, **response_fields(answers[0], self.model, self.id))
