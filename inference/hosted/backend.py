"""Answers from Moondream Cloud, or any server that speaks its API: candidates side by side, each in its own call."""

from __future__ import annotations

import math
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from inference.hosted.client import CloudError, MoondreamClient, photo_url
from inference.registry import ModelSpec
from inference.types import (
    MAX_OBJECTS,
    SKILLS,
    Answer,
    Box,
    CandidateFailed,
    Event,
    InferenceError,
    Point,
    Queued,
    Request,
    TextUpdate,
    clean,
    recipe_prompt,
)

IMAGE_TOKENS = 730  # of a photo, whatever its size
TEMPLATES = {"caption": 5, "query": 4, "recipe": 4, "detect": 5, "point": 4, "segment": 5}
CHARACTERS = 4  # per token of text, for estimates
MAX_TOKENS = {"recipe": 192, "query": 768, "caption": 768}
MAX_PATH = 100_000  # characters
PATH = re.compile(r"[MmLlHhVvCcSsQqTtAaZz0-9eE.,+\-\s]*")  # all that SVG path data is made of
SIDES = ("x_min", "y_min", "x_max", "y_max")
LOOK = 0.1  # seconds between two looks whether somebody still waits
Cancelled = Callable[[], bool]


def answer(entry: ModelSpec, request: Request, cancel: threading.Event) -> Iterator[Event]:
    """Yields Waiting, Partial and, per candidate, one Answer or Failed, as they come.

    Boxes, points and outlines are a model's best guess, and so is everything at temperature 0: one call stands for all
    candidates. Raises InferenceError where every candidate failed, and where it is cancelled.
    """
    calls = _Calls(entry, request, cancel)
    yield Queued(0)
    try:
        yield from calls.events()
    finally:
        calls.gone.set()


@dataclass(frozen=True)
class _Lost:
    """A call that failed, and the candidates for which it stood."""

    places: list[int]
    error: CloudError


class _Calls:
    """The calls of one request, each in a thread of its own."""

    def __init__(self, entry: ModelSpec, request: Request, cancel: threading.Event) -> None:
        self.entry, self.request, self.cancel = entry, request, cancel
        try:
            self.server = MoondreamClient(entry.source, entry.key, entry.rate)
        except ValueError as error:
            raise InferenceError("provider", f"{entry.title} cannot be asked: {error}") from None
        once = SKILLS[request.skill].output == "regions" or request.temperature * entry.temperature == 0
        self.places = [list(range(request.n))] if once else [[place] for place in range(request.n)]
        self.gone = threading.Event()
        self.inbox: queue.SimpleQueue[Event | _Lost] = queue.SimpleQueue()

    def events(self) -> Iterator[Event]:
        """See `answer`."""
        photo = photo_url(self.request.photo)
        for places in self.places:
            threading.Thread(target=self._one, args=(places, photo), name=f"ask-{self.entry.name}", daemon=True).start()
        left, lost = self.request.n, 0
        while left:
            event = self._next()
            if isinstance(event, _Lost):
                lost += 1
                if lost == len(self.places):
                    raise event.error
                left -= len(event.places)
                yield from (CandidateFailed(place, event.error.message) for place in event.places)
            else:
                left -= isinstance(event, Answer)
                yield event

    def _next(self) -> Event | _Lost:
        while True:
            if self.cancel.is_set():
                raise InferenceError("cancelled", "Cancelled.")
            try:
                return self.inbox.get(timeout=LOOK)
            except queue.Empty:
                continue

    def _stopped(self) -> bool:
        return self.gone.is_set() or self.cancel.is_set()

    def _one(self, places: list[int], photo: str) -> None:
        """One call, for these candidates."""
        try:
            found = self._streamed(places, photo) if self._can_stream() else self._whole(photo)
        except CloudError as error:
            self.inbox.put(_Lost(places, error))
            return
        for place in places:
            self.inbox.put(Answer(place, **found))

    def _can_stream(self) -> bool:
        return self.request.skill in ("query", "caption") and not self.request.reasoning

    def _whole(self, photo: str) -> dict[str, Any]:
        asked = time.monotonic()
        reply = self.server.post(_path(self.request), self._body(photo), self._stopped)
        waited = max(0.0, time.monotonic() - asked - reply.seconds)
        found = read(self.request, reply.data)
        times = {"seconds": reply.seconds, "first_token_seconds": _first(reply.data, reply.seconds)}
        facts = {"request_id": reply.request_id, "perhaps_charged": reply.perhaps_charged, "queue_seconds": waited}
        return found | times | facts | self._tokens(reply.data, found)

    def _streamed(self, places: list[int], photo: str) -> dict[str, Any]:
        asked = time.monotonic()
        text, first, last = "", 0.0, {}
        for event in self.server.stream(_path(self.request), self._body(photo) | {"stream": True}, self._stopped):
            last = event
            piece = event.get("chunk", event.get("text"))
            text += piece if isinstance(piece, str) else ""
            first = first or time.monotonic() - asked
            if piece:
                for place in places:
                    self.inbox.put(TextUpdate(place, clean(text)))
        whole = last.get("answer", last.get("caption"))
        found = {"text": clean(text or (whole if isinstance(whole, str) else ""))}
        seconds = time.monotonic() - asked
        facts = {"seconds": seconds, "first_token_seconds": first, "request_id": str(last.get("request_id") or "")[:64]}
        return found | facts | self._tokens(last, found)

    def _body(self, photo: str) -> dict[str, Any]:
        request, skill = self.request, self.request.skill
        body: dict[str, Any] = {"model": self._model(), "image_url": photo, "stream": False}
        if skill == "caption":
            body["length"] = request.length
        elif skill in ("query", "recipe"):
            body["question"] = self._question()
            body["reasoning"] = request.reasoning and skill == "query"
        else:
            body["object"] = request.prompt
        if skill in MAX_TOKENS:
            temperature = request.temperature * self.entry.temperature
            settings = {"temperature": temperature, "top_p": self.entry.top_p, "max_tokens": MAX_TOKENS[skill]}
            return body | {"settings": settings}
        return body | ({"settings": {"max_objects": MAX_OBJECTS}} if skill != "segment" else {})

    def _question(self) -> str:
        grammar_in_prompt = self.request.skill == "recipe" and self.entry.grammar_in_prompt
        return recipe_prompt(self.request.prompt) if grammar_in_prompt else self.request.prompt

    def _model(self) -> str:
        return self.entry.remote_id or (self.entry.name if self.entry.needs_key else _first_model(self.server))

    def _tokens(self, data: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
        """Tokens as they are reported, else an estimate."""
        told = data.get("metrics")
        metrics = told if isinstance(told, dict) else {}
        came, went = metrics.get("input_tokens"), metrics.get("output_tokens")
        if _is_count(came) and _is_count(went):
            return {"tokens_in": came, "tokens_out": went}
        words = self._question() if self.request.skill in ("query", "recipe") else self.request.prompt
        asked = IMAGE_TOKENS + TEMPLATES[self.request.skill] + math.ceil(len(words) / CHARACTERS)
        regions = 3 * len(found.get("boxes", ())) + 2 * len(found.get("points", ()))
        length = sum(len(found.get(part, "")) for part in ("text", "reasoning", "path"))
        return {"tokens_in": asked, "tokens_out": regions + math.ceil(length / CHARACTERS) + 1, "estimated": True}


def read(request: Request, data: dict[str, Any]) -> dict[str, Any]:
    """What an answer holds, as keywords of Answer. Takes what is there and passes over what makes no sense."""
    match request.skill:
        case "detect":
            return {"text": "", "boxes": tuple(_boxes(data.get("objects")))}
        case "point":
            return {"text": "", "points": tuple(_points(data.get("points")))}
        case "segment":
            return {"text": "", "path": _outline(data.get("path")), "boxes": tuple(_boxes([data.get("bbox")]))}
        case "caption":
            return {"text": _text(data, "caption")}
        case _:
            return {"text": _text(data, "answer")} | _reasoning(data.get("reasoning"))


def _path(request: Request) -> str:
    return "query" if request.skill == "recipe" else request.skill


def _text(data: dict[str, Any], name: str) -> str:
    if not isinstance(data.get(name), str):
        raise CloudError("provider", "The answer has no text in it. Try another model, or later.", 200)
    return clean(data[name])


def _reasoning(told: Any) -> dict[str, Any]:
    """What was thought, the spans of it that refer to the photo, and where. A string is a thought without either."""
    if isinstance(told, str):
        told = {"text": told}
    if not isinstance(told, dict) or not isinstance(told.get("text"), str):
        return {}
    spans: list[tuple[int, int]] = []
    points: list[Point] = []
    grounding = told.get("grounding")
    for part in grounding if isinstance(grounding, list) else []:
        if isinstance(part, dict) and _is_count(part.get("start_idx")) and _is_count(part.get("end_idx")):
            spans.append((part["start_idx"], part["end_idx"]))
            points += _points(part.get("points"))
    return {"reasoning": told["text"], "grounded": tuple(spans), "points": tuple(points)}


def _boxes(told: Any) -> Iterator[Box]:
    for one in told if isinstance(told, list) else []:
        sides = [
            _share(one.get(name)) if isinstance(one, dict) else None for name in ("x_min", "y_min", "x_max", "y_max")
        ]
        if None not in sides:
            yield Box(*sides)  # type: ignore[arg-type]


def _points(told: Any) -> Iterator[Point]:
    for one in told if isinstance(told, list) else []:
        pair = (one.get("x"), one.get("y")) if isinstance(one, dict) else one
        if isinstance(pair, list | tuple) and len(pair) == 2:
            x, y = map(_share, pair)
            if x is not None and y is not None:
                yield Point(x, y)


def _outline(told: Any) -> str:
    if not isinstance(told, str) or not told.strip():
        return ""
    if len(told) > MAX_PATH or not PATH.fullmatch(told):
        raise CloudError("provider", "The outline that came back is no SVG path. Try again.", 200)
    return told


def _share(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return min(1.0, max(0.0, float(value)))


def _first(data: dict[str, Any], seconds: float) -> float:
    metrics = data.get("metrics")
    told = metrics.get("ttft_ms") if isinstance(metrics, dict) else None
    return told / 1000 if isinstance(told, int | float) and 0 < told / 1000 <= seconds else seconds


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@lru_cache(maxsize=64)
def _first_model(server: MoondreamClient) -> str:
    """The first model that a server lists; Moondream 2, which Station serves, where it does not say."""
    return next(iter(model_ids(server)), "moondream2")


def model_ids(server: MoondreamClient) -> list[str]:
    """The models that a server lists, in OpenAI's shape or in Moondream Station's; none where it cannot be asked."""
    try:
        data = server.get("models").data
    except CloudError:
        return []
    listed = data.get("data", data.get("models"))
    ids = [one.get("id") for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    return [one for one in ids if isinstance(one, str) and re.fullmatch(r"[A-Za-z0-9._/@:-]{1,200}", one)][:50]
