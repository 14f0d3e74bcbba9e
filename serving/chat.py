"""POST /v1/chat/completions: OpenAI's chat completions about a photo, answered by the same calls as /v1/query."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from inference.types import NO_PHOTO, Answer, ModelSpec, skill_of_question
from serving.chat_schemas import (
    ChatMessageResponse,
    ChatRequest,
    ChatResponse,
    Choice,
    RegionFormat,
    TokenUsage,
)
from serving.errors import OPENAI_PATH, ApiError, OpenAIErrorResponse, error_body
from serving.json_body import JsonRoute
from serving.model_call import STREAM_RESPONSES, Dispatcher, ModelCall, sse
from serving.schemas import decode_photo

ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": OpenAIErrorResponse} for status in (400, 401, 402, 403, 404, 408, 409, 413, 429, 500, 503)
}


def router(dispatcher: Dispatcher) -> APIRouter:
    """Create the route.

    Args:
        dispatcher: Runs the model calls.
    """
    routes = APIRouter(responses=ERROR_RESPONSES, route_class=JsonRoute)

    @routes.post("/chat/completions", response_model=ChatResponse, responses=STREAM_RESPONSES)
    async def chat_completions(body: ChatRequest, http_request: HttpRequest) -> Response:
        spec = await dispatcher.find_model(body.model, http_request)
        _check_abilities(body, spec)
        regions, url = body.regions(), body.image_url()
        skill, prompt = _task(body, regions, url is not None)
        call = dispatcher.call(
            http_request,
            spec,
            skill,
            lambda: _decode(url),
            body.sampling(),
            prompt=prompt,
            n=body.n or 1,
            stop=() if regions else body.stops(),
            reasoning=bool(body.reasoning),
        )
        completion = Completion(call, regions, body.question())
        if body.stream:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            return await call.stream(ChunkEvents(completion, include_usage))
        return await call.response(completion.body)

    return routes


def _check_abilities(body: ChatRequest, spec: ModelSpec) -> None:
    """Raise ApiError (400) if the request needs what the model cannot do."""
    if body.reasoning and not spec.reasons:
        raise ApiError(400, f"{spec.title} cannot reason. Omit reasoning.", param="reasoning")
    if body.tools:
        raise ApiError(400, f"{spec.title} cannot call tools. Omit tools.", param="tools")
    if body.logprobs:
        raise ApiError(400, "Log probabilities are not available. Omit logprobs.", param="logprobs")


def _task(body: ChatRequest, regions: RegionFormat | None, has_photo: bool) -> tuple[str, str]:
    """Return the skill and the prompt. A photo without words gets a caption. Raises ApiError (400)."""
    question = body.question()
    if regions:
        return regions.skill, question  # the name of the object
    skill, prompt = skill_of_question(question)
    if skill == "recipe":
        return skill, prompt
    if not question:
        if has_photo:
            return "caption", ""
        raise ApiError(400, "The last message is empty. Send a question, a photo, or both.", param="messages")
    return "query", body.conversation()


def _decode(url: str | None) -> np.ndarray:
    return NO_PHOTO if url is None else decode_photo(url)


class Completion:
    """The answers of a call as a chat completion."""

    def __init__(self, call: ModelCall, regions: RegionFormat | None, label: str) -> None:
        """Create the completion.

        Args:
            call: The call.
            regions: The form of boxes or points, or None for text.
            label: Label of boxes and points that have one: the name of the object.
        """
        self.model, self.regions, self.label = call.spec.name, regions, label
        self.id, self.created = f"chatcmpl-{call.id}", int(time.time())
        self.request_id = call.id

    def content(self, answer: Answer) -> str:
        """Return an answer's text, or its boxes or points as JSON."""
        if self.regions is None:
            return answer.text
        regions = answer.boxes if self.regions.skill == "detect" else answer.points
        label = {"label": self.label} if self.regions.label else {}
        return json.dumps({self.regions.key: [{**asdict(region), **label} for region in regions]})

    def usage(self, answers: Sequence[Answer]) -> TokenUsage:
        """Return the token counts of all answers."""
        prompt, completion = answers[0].tokens_in, sum(answer.tokens_out for answer in answers)
        return TokenUsage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)

    def body(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the response as JSON."""
        choices = [
            Choice(
                index=answer.index,
                message=ChatMessageResponse(content=self.content(answer), reasoning=answer.reasoning or None),
                finish_reason=finish_reason(answer),
            )
            for answer in answers
        ]
        response = ChatResponse(
            id=self.id, created=self.created, model=self.model, choices=choices, usage=self.usage(answers)
        )
        return response.model_dump()


class ChunkEvents:
    """Formats a completion as OpenAI's server-sent events."""

    def __init__(self, completion: Completion, include_usage: bool) -> None:
        """Create the format.

        Args:
            completion: The completion.
            include_usage: Whether to add a last chunk with token counts.
        """
        self.completion, self.include_usage = completion, include_usage
        self._started: set[int] = set()

    def text(self, answer: Answer) -> str:
        """Return the content of the answer."""
        return self.completion.content(answer)

    def update(self, index: int, chunk: str) -> str:
        """Return the event of the next part of a choice; the first one has the role."""
        role = {} if index in self._started else {"role": "assistant"}
        self._started.add(index)
        return self._chunk(index, {**role, "content": chunk})

    def end(self, answers: Sequence[Answer]) -> Iterator[str]:
        """Yield the reason why each choice ended, the token counts, and the end mark."""
        for answer in answers:
            if answer.index not in self._started:  # an empty answer
                yield self.update(answer.index, "")
            yield self._chunk(answer.index, {}, finish_reason(answer))
        if self.include_usage:
            yield self._event([], self.completion.usage(answers).model_dump())
        yield "data: [DONE]\n\n"

    def failure(self, error: ApiError) -> Iterator[str]:
        """Yield the error and the end mark."""
        yield sse(**error_body(error, self.completion.request_id, OPENAI_PATH))
        yield "data: [DONE]\n\n"

    def _chunk(self, index: int, delta: dict[str, str], finish: str | None = None) -> str:
        return self._event([{"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}])

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        """Format a chunk. With `include_usage` every chunk has the field, as OpenAI's."""
        completion = self.completion
        fields = {"id": completion.id, "object": "chat.completion.chunk", "created": completion.created}
        with_usage = {"usage": usage} if self.include_usage else {}
        return sse(**fields, model=completion.model, choices=choices, **with_usage)


def finish_reason(answer: Answer) -> Literal["stop", "length"]:
    """Return why an answer ended."""
    return "length" if answer.truncated else "stop"
