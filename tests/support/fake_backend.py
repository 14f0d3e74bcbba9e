"""A backend without weights: answers are drawn from the seed."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np

from inference.types import Answer, AnswerEvent, Box, InferenceError, ModelSpec, Point, Queued, Request, TextUpdate
from recipes import random_recipe

HOSTILE = (
    '<img src=x onerror="window.hacked=1"> ${window.hacked=2} {{constructor}} `+(window.hacked=3)+` \\u{110000} '
    "</template><script>window.hacked=4</script> \u202edrow"
)


def fake_spec(name: str, behaviour: str = "", **settings: object) -> ModelSpec:
    """Create a model of this backend.

    Args:
        name: Name of the model.
        behaviour: "" answers at once; "slow" takes 0.2 s per word; "broken" raises InferenceError; "bug" raises
            TypeError; "queued" first waits behind two requests; "prose" writes text without a recipe; "hostile" writes
            markup and template code.
        **settings: Other fields of ModelSpec.
    """
    return ModelSpec(
        name=name, title=f"Fake {name}", note=f"Fake model {name}.", backend="fake", source=behaviour, **settings
    )


def answer(spec: ModelSpec, request: Request, cancel: threading.Event) -> Iterator[AnswerEvent]:
    """Yield queue positions, text updates and one Answer per candidate, as every backend does."""
    if spec.source == "queued":
        yield from (Queued(2), Queued(1))
        _wait(2.0, cancel)
    yield Queued(0)
    if spec.source == "broken":
        raise InferenceError("failed", "The fake model is broken. Choose another one.")
    if spec.source == "bug":
        raise TypeError("a bug")
    for index in range(request.n):
        text = _text(spec, request, index)
        words = text.split(" ") if request.skill != "recipe" or spec.source == "slow" else []
        for count in range(1, len(words)):
            _wait(0.2 if spec.source == "slow" else 0.01, cancel)
            yield TextUpdate(index, " ".join(words[:count]))
        x, y = (float(value) for value in np.random.default_rng(request.seed + index).uniform(0.1, 0.5, 2))
        boxes = (Box(x, y, x + 0.4, y + 0.4),) if request.skill in ("detect", "segment") else ()
        points = (Point(x, y),) if request.skill == "point" else ()
        path = f"M {x} {y} h 0.4 v 0.4 Z" if request.skill == "segment" else ""
        yield Answer(index, text, boxes, points, 740, len(text), seconds=0.1 * (index + 1), path=path)


def _text(spec: ModelSpec, request: Request, index: int) -> str:
    if spec.source == "hostile":
        return HOSTILE
    if spec.source == "prose":
        return "What a lovely day it was."
    if request.skill == "recipe":
        return str(random_recipe(np.random.default_rng(request.seed + index + 100 * len(spec.name))))
    if request.skill in ("detect", "point", "segment"):
        return ""
    return f"{request.skill} {index}: a photo of {request.photo.shape[1]} by {request.photo.shape[0]} pixels."


def _wait(seconds: float, cancel: threading.Event) -> None:
    if cancel.wait(seconds):
        raise InferenceError("cancelled", "The run was cancelled.")
