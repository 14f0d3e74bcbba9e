"""A backend that answers at once, without weights: what a model would say, drawn from the seed. For tests only."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np

from inference.registry import ModelSpec
from inference.types import Answer, Box, Event, InferenceError, Point, Queued, Request, TextUpdate
from recipes import random_recipe

PAUSE = 0.0


def entry(name: str, source: str = "", **settings: object) -> ModelSpec:
    """A model on this backend. source: '' answers; 'slow' takes 0.2 s a word; 'broken' fails; 'bug' raises TypeError;
    'queued' waits behind two others first; 'prose' writes a recipe that cannot be read; 'hostile' writes markup."""
    return ModelSpec(
        name=name, title=f"Fake {name}", note=f"{name} of the tests", backend="fake", source=source, **settings
    )


def answer(entry: ModelSpec, request: Request, cancel: threading.Event) -> Iterator[Event]:
    """The contract of a backend: Waiting, Partial and one Answer per candidate."""
    if entry.source == "queued":
        yield from (Queued(2), Queued(1))
        _pause(2.0, cancel)
    yield Queued(0)
    if entry.source == "broken":
        raise InferenceError("failed", "The fake model is broken. Choose another one.")
    if entry.source == "bug":
        raise TypeError("a bug")
    for index in range(request.n):
        yield from _candidate(entry, request, index, cancel)


def _candidate(entry: ModelSpec, request: Request, index: int, cancel: threading.Event) -> Iterator[Event]:
    text = _text(entry, request, index)
    words = text.split(" ") if request.skill != "recipe" or entry.source == "slow" else []
    for count in range(1, len(words)):
        _pause(0.2 if entry.source == "slow" else 0.01, cancel)
        yield TextUpdate(index, " ".join(words[:count]))
    rng = np.random.default_rng(request.seed + index)
    x, y = (float(value) for value in rng.uniform(0.1, 0.5, 2))
    boxes = (Box(x, y, x + 0.4, y + 0.4),) if request.skill == "detect" else ()
    points = (Point(x, y),) if request.skill == "point" else ()
    yield Answer(index, text, boxes, points, 740, len(text), seconds=0.1 * (index + 1))


def _text(entry: ModelSpec, request: Request, index: int) -> str:
    if entry.source == "hostile":
        return HOSTILE
    if entry.source == "prose":
        return "What a lovely day it was."
    if request.skill == "recipe":
        return str(random_recipe(np.random.default_rng(request.seed + index + 100 * len(entry.name))))
    if request.skill in ("detect", "point"):
        return ""
    return f"{request.skill} {index}: a photo of {request.photo.shape[1]} by {request.photo.shape[0]} pixels."


def _pause(seconds: float, cancel: threading.Event) -> None:
    if cancel.wait(seconds):
        raise InferenceError("cancelled", "The run was cancelled.")
    time.sleep(0)


HOSTILE = (
    '<img src=x onerror="window.hacked=1"> ${window.hacked=2} {{constructor}} `+(window.hacked=3)+` \\u{110000} '
    "</template><script>window.hacked=4</script> \u202edrow"
)
