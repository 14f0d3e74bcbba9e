"""Answers from Photon, Moondream's own engine, where there is a GPU that it runs on. It sends telemetry to Moondream.

It has never run here: the tests put another client in its place.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from PIL import Image

from inference.hosted.backend import MAX_TOKENS, read
from inference.local.device_queue import Cancelled, DeviceQueue
from inference.registry import ModelSpec
from inference.types import MAX_OBJECTS, SKILLS, Answer, Event, InferenceError, Queued, Request, recipe_prompt

_TURNS = DeviceQueue()  # one engine, one queue


def answer(entry: ModelSpec, request: Request, cancel: threading.Event) -> Iterator[Event]:
    """Yields Waiting and, per candidate, one Answer. Raises InferenceError."""
    yield Queued(len(_TURNS))
    try:
        with _TURNS.turn(cancel.is_set, lambda position: None):
            yield from _answers(entry, request, cancel)
    except Cancelled:
        raise InferenceError("cancelled", "Cancelled.") from None


def _answers(entry: ModelSpec, request: Request, cancel: threading.Event) -> Iterator[Answer]:
    client, photo = _client(entry.source), Image.fromarray(request.photo)
    once = SKILLS[request.skill].output == "regions" or request.temperature * entry.temperature == 0
    for group in [range(request.n)] if once else [[place] for place in range(request.n)]:
        if cancel.is_set():
            raise Cancelled
        began = time.perf_counter()
        found = read(request, _ask(client, entry, request, photo))
        seconds = time.perf_counter() - began
        yield from (Answer(place, **found, seconds=seconds, first_token_seconds=seconds) for place in group)


def _ask(client: Any, entry: ModelSpec, request: Request, photo: Image.Image) -> dict[str, Any]:
    skill = request.skill
    settings: dict[str, Any] = {"max_objects": MAX_OBJECTS}
    if skill in MAX_TOKENS:
        temperature = request.temperature * entry.temperature
        settings = {"temperature": temperature, "top_p": entry.top_p, "max_tokens": MAX_TOKENS[skill]}
    try:
        match skill:
            case "recipe":
                return client.query(photo, recipe_prompt(request.prompt), reasoning=False, settings=settings)
            case "query":
                return client.query(photo, request.prompt, reasoning=request.reasoning, settings=settings)
            case "caption":
                return client.caption(photo, length=request.length, settings=settings)
            case "detect" | "point":
                return getattr(client, skill)(photo, request.prompt, settings=settings)
    except Exception as error:
        raise InferenceError("failed", f"Photon failed ({type(error).__name__}). The log has the details.") from error
    raise InferenceError("unsupported", f"{entry.title} cannot {skill}. Choose a model of Moondream Cloud.")


@lru_cache(maxsize=1)
def _client(model: str) -> Any:
    """The engine, started at the first answer."""
    import moondream  # not among the requirements: see requirements-gpu.txt

    return moondream.photon(model)
