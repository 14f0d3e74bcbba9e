"""Backend for Moondream Cloud and other servers with its API. Candidates run concurrently, one call each."""

from __future__ import annotations

import logging
import math
import queue
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from inference.hosted.client import CloudError, MoondreamClient, photo_data_url
from inference.types import (
    MAX_OBJECTS,
    SKILLS,
    Answer,
    AnswerEvent,
    Box,
    CandidateFailed,
    InferenceError,
    ModelSpec,
    Point,
    Queued,
    Request,
    TextUpdate,
    clean,
    recipe_prompt,
)

IMAGE_TOKENS = 730  # of a photo of any size
TEMPLATE_TOKENS = {"caption": 5, "query": 4, "recipe": 4, "detect": 5, "point": 4, "segment": 5}
CHARACTERS_PER_TOKEN = 4  # for estimates
MAX_TOKENS = {"recipe": 192, "query": 768, "caption": 768}
MAX_PATH_LENGTH = 100_000  # characters
SVG_PATH = re.compile(r"[MmLlHhVvCcSsQqTtAaZz0-9eE.,+\-\s]*")
BOX_KEYS = ("x_min", "y_min", "x_max", "y_max")
POLL_SECONDS = 0.1  # poll interval for cancellation
_log = logging.getLogger(__name__)


def answer(spec: ModelSpec, request: Request, cancel: threading.Event) -> Iterator[AnswerEvent]:
    """Run a hosted model.

    Regions, and everything at temperature 0, are deterministic: one call answers all candidates.

    Yields:
        Queued, TextUpdate and, per candidate, one Answer or CandidateFailed, as they arrive.

    Raises:
        InferenceError: If all candidates fail, or if cancelled.
    """
    calls = _CandidateCalls(spec, request, cancel)
    yield Queued(0)
    try:
        yield from calls.run()
    finally:
        calls.closed.set()


@dataclass(frozen=True)
class _CallFailed:
    """A failed call and the indices of the candidates that it was for."""

    indices: list[int]
    error: InferenceError


class _CandidateCalls:
    """The calls of one request, each in its own thread."""

    def __init__(self, spec: ModelSpec, request: Request, cancel: threading.Event) -> None:
        self.spec, self.request, self.cancel = spec, request, cancel
        try:
            self.client = MoondreamClient(spec.source, spec.key, spec.rate)
        except ValueError as error:
            raise InferenceError("provider", f"{spec.title} is misconfigured: {error}") from None
        single_call = SKILLS[request.skill].output == "regions" or request.temperature * spec.temperature == 0
        self.groups = [list(range(request.n))] if single_call else [[index] for index in range(request.n)]
        self.closed = threading.Event()
        self.events: queue.SimpleQueue[AnswerEvent | _CallFailed] = queue.SimpleQueue()

    def run(self) -> Iterator[AnswerEvent]:
        """Start the calls and yield their events. See `answer`."""
        photo = photo_data_url(self.request.photo) if self.request.has_photo else ""
        for indices in self.groups:
            threading.Thread(
                target=self._call, args=(indices, photo), name=f"hosted-{self.spec.name}", daemon=True
            ).start()
        pending, failures = self.request.n, 0
        while pending:
            event = self._next_event()
            if isinstance(event, _CallFailed):
                failures += 1
                if failures == len(self.groups):
                    raise event.error
                pending -= len(event.indices)
                yield from (CandidateFailed(index, event.error.message) for index in event.indices)
            else:
                pending -= isinstance(event, Answer)
                yield event

    def _next_event(self) -> AnswerEvent | _CallFailed:
        while True:
            if self.cancel.is_set():
                raise InferenceError("cancelled", "Cancelled.")
            try:
                return self.events.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue

    def _is_cancelled(self) -> bool:
        return self.closed.is_set() or self.cancel.is_set()

    def _call(self, indices: list[int], photo: str) -> None:
        """Make one call for these candidates."""
        streamed = self.request.skill in ("query", "caption") and not self.request.reasoning
        try:
            fields = self._stream(indices, photo) if streamed else self._post(photo)
        except CloudError as error:
            self.events.put(_CallFailed(indices, error))
            return
        except Exception as error:  # the reader waits for an event; the text may contain a proxy's password
            _log.error("A call to %s failed with %s", self.spec.name, type(error).__name__)
            self.events.put(_CallFailed(indices, InferenceError("failed", self._unexpected(error))))
            return
        for index in indices:
            self.events.put(Answer(index, **fields))

    def _unexpected(self, error: Exception) -> str:
        return (
            f"The call to {self.spec.title} could not be made ({type(error).__name__}). If a proxy is set (ALL_PROXY, "
            "HTTPS_PROXY), check its address; a SOCKS proxy also needs the Python package socksio."
        )

    def _post(self, photo: str) -> dict[str, Any]:
        """Make a call without streaming. Returns the fields of the Answer."""
        start = time.monotonic()
        response = self.client.post(self._endpoint(), self._body(photo), self._is_cancelled)
        fields = parse_answer(self.request, response.data)
        return {
            **fields,
            "seconds": response.seconds,
            "first_token_seconds": _first_token_seconds(response.data, response.seconds),
            "queue_seconds": max(0.0, time.monotonic() - start - response.seconds),
            "request_id": response.request_id,
            "possible_extra_charges": response.possible_extra_charges,
            **self._token_counts(response.data, fields),
        }

    def _stream(self, indices: list[int], photo: str) -> dict[str, Any]:
        """Make a streaming call and emit text updates. Returns the fields of the Answer."""
        start = time.monotonic()
        text, first_token_seconds, last_event = "", 0.0, {}
        for event in self.client.stream(self._endpoint(), self._body(photo) | {"stream": True}, self._is_cancelled):
            last_event = event
            chunk = event.get("chunk", event.get("text"))
            text += chunk if isinstance(chunk, str) else ""
            first_token_seconds = first_token_seconds or time.monotonic() - start
            if chunk:
                for index in indices:
                    self.events.put(TextUpdate(index, clean(text)))
        full_text = last_event.get("answer", last_event.get("caption"))
        fields = {"text": clean(text or (full_text if isinstance(full_text, str) else ""))}
        return {
            **fields,
            "seconds": time.monotonic() - start,
            "first_token_seconds": first_token_seconds,
            "request_id": str(last_event.get("request_id") or "")[:64],
            **self._token_counts(last_event, fields),
        }

    def _endpoint(self) -> str:
        return "query" if self.request.skill == "recipe" else self.request.skill

    def _body(self, photo: str) -> dict[str, Any]:
        request, skill = self.request, self.request.skill
        model = self.spec.remote_id or (self.spec.name if self.spec.needs_key else _default_model(self.client))
        body: dict[str, Any] = {"model": model, "stream": False}
        if photo:
            body["image_url"] = photo
        if request.spatial_refs:
            body["spatial_refs"] = [list(ref) for ref in request.spatial_refs]
        if skill == "caption":
            body["length"] = request.length
        elif skill in ("query", "recipe"):
            body["question"] = self._question()
            body["reasoning"] = request.reasoning and skill == "query"
        else:
            body["object"] = request.prompt
        if skill in MAX_TOKENS:
            temperature = request.temperature * self.spec.temperature
            body["settings"] = {"temperature": temperature, "top_p": self.spec.top_p, "max_tokens": MAX_TOKENS[skill]}
        elif skill != "segment":
            body["settings"] = {"max_objects": MAX_OBJECTS}
        return body

    def _question(self) -> str:
        explain_grammar = self.request.skill == "recipe" and self.spec.grammar_in_prompt
        return recipe_prompt(self.request.prompt) if explain_grammar else self.request.prompt

    def _token_counts(self, data: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
        """Return the reported token counts, or estimates."""
        metrics = data.get("metrics")
        metrics = metrics if isinstance(metrics, dict) else {}
        tokens_in, tokens_out = metrics.get("input_tokens"), metrics.get("output_tokens")
        if _is_count(tokens_in) and _is_count(tokens_out):
            return {"tokens_in": tokens_in, "tokens_out": tokens_out}
        prompt = self._question() if self.request.skill in ("query", "recipe") else self.request.prompt
        prompt_tokens = math.ceil(len(prompt) / CHARACTERS_PER_TOKEN)
        region_tokens = 3 * len(fields.get("boxes", ())) + 2 * len(fields.get("points", ()))
        characters = sum(len(fields.get(name, "")) for name in ("text", "reasoning", "path"))
        return {
            "tokens_in": IMAGE_TOKENS + TEMPLATE_TOKENS[self.request.skill] + prompt_tokens,
            "tokens_out": region_tokens + math.ceil(characters / CHARACTERS_PER_TOKEN) + 1,
            "estimated": True,
        }


def parse_answer(request: Request, data: dict[str, Any]) -> dict[str, Any]:
    """Parse a response to fields of Answer. Malformed optional parts are skipped.

    Raises:
        CloudError: If the text is missing or an outline is malformed.
    """
    match request.skill:
        case "detect":
            return {"text": "", "boxes": tuple(_parse_boxes(data.get("objects")))}
        case "point":
            return {"text": "", "points": tuple(_parse_points(data.get("points")))}
        case "segment":
            path, boxes = _parse_path(data.get("path")), tuple(_parse_boxes([data.get("bbox")]))
            return {"text": "", "path": path, "boxes": boxes}
        case "caption":
            return {"text": _parse_text(data, "caption")}
        case _:
            return {"text": _parse_text(data, "answer")} | _parse_reasoning(data.get("reasoning"))


def _parse_text(data: dict[str, Any], key: str) -> str:
    if not isinstance(data.get(key), str):
        raise CloudError("provider", "The response contains no text. Try again, or choose another model.", 200)
    return clean(data[key])


def _parse_reasoning(reasoning: Any) -> dict[str, Any]:
    """Parse the reasoning text, its spans that refer to the photo, and the points of these. A string has no spans."""
    if isinstance(reasoning, str):
        reasoning = {"text": reasoning}
    if not isinstance(reasoning, dict) or not isinstance(reasoning.get("text"), str):
        return {}
    spans: list[tuple[int, int]] = []
    points: list[Point] = []
    grounding = reasoning.get("grounding")
    for item in grounding if isinstance(grounding, list) else []:
        if isinstance(item, dict) and _is_count(item.get("start_idx")) and _is_count(item.get("end_idx")):
            spans.append((item["start_idx"], item["end_idx"]))
            points += _parse_points(item.get("points"))
    return {"reasoning": reasoning["text"], "grounded": tuple(spans), "points": tuple(points)}


def _parse_boxes(items: Any) -> Iterator[Box]:
    for item in items if isinstance(items, list) else []:
        sides = [_parse_fraction(item.get(key)) if isinstance(item, dict) else None for key in BOX_KEYS]
        if None not in sides:
            yield Box(*sides)  # type: ignore[arg-type]


def _parse_points(items: Any) -> Iterator[Point]:
    for item in items if isinstance(items, list) else []:
        pair = (item.get("x"), item.get("y")) if isinstance(item, dict) else item
        if isinstance(pair, list | tuple) and len(pair) == 2:
            x, y = map(_parse_fraction, pair)
            if x is not None and y is not None:
                yield Point(x, y)


def _parse_path(path: Any) -> str:
    if not isinstance(path, str) or not path.strip():
        return ""
    if len(path) > MAX_PATH_LENGTH or not SVG_PATH.fullmatch(path):
        raise CloudError("provider", "The outline in the response is not a valid SVG path. Try again.", 200)
    return path


def _parse_fraction(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return min(1.0, max(0.0, float(value)))


def _first_token_seconds(data: dict[str, Any], seconds: float) -> float:
    metrics = data.get("metrics")
    milliseconds = metrics.get("ttft_ms") if isinstance(metrics, dict) else None
    if isinstance(milliseconds, int | float) and 0 < milliseconds / 1000 <= seconds:
        return milliseconds / 1000
    return seconds


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _default_model(client: MoondreamClient) -> str:
    """Return the first model that a server lists, or moondream2 (the model of Moondream Station) if it lists none."""
    try:
        return _first_model(client)
    except LookupError:
        return "moondream2"


@lru_cache(maxsize=64)
def _first_model(client: MoondreamClient) -> str:
    """Return the first model that a server lists. Raises LookupError, which is not cached, if it lists none."""
    return model_ids(client)[0]


def model_ids(client: MoondreamClient) -> list[str]:
    """Return the ids of the models of a server (OpenAI or Moondream Station format), or [] if the call fails."""
    try:
        data = client.get("models").data
    except CloudError:
        return []
    items = data.get("data", data.get("models"))
    ids = [item.get("id") for item in items if isinstance(item, dict)] if isinstance(items, list) else []
    return [id_ for id_ in ids if isinstance(id_, str) and re.fullmatch(r"[A-Za-z0-9._/@:-]{1,200}", id_)][:50]
