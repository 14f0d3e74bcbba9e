"""Backend for Photon, Moondream's own inference engine. It needs a supported GPU and sends telemetry to Moondream.

Tested only with a fake client; it has not been run on a real Photon engine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from PIL import Image

from inference.hosted.backend import MAX_TOKENS, parse_answer
from inference.local.device_queue import Cancelled, DeviceQueue
from inference.types import (
    MAX_OBJECTS,
    SKILLS,
    Answer,
    AnswerEvent,
    InferenceError,
    ModelSpec,
    Queued,
    Request,
    recipe_prompt,
)

_QUEUE = DeviceQueue()


def answer(spec: ModelSpec, request: Request, cancel: threading.Event) -> Iterator[AnswerEvent]:
    """Run a model on Photon.

    Yields:
        Queued and, per candidate, one Answer.

    Raises:
        InferenceError: If Photon fails or the request is cancelled.
    """
    yield Queued(len(_QUEUE))
    try:
        with _QUEUE.acquire(cancel.is_set, lambda position: None):
            yield from _answers(spec, request, cancel)
    except Cancelled:
        raise InferenceError("cancelled", "Cancelled.") from None


def _answers(spec: ModelSpec, request: Request, cancel: threading.Event) -> Iterator[Answer]:
    client, photo = _client(spec.source), Image.fromarray(request.photo)
    single_call = SKILLS[request.skill].output == "regions" or request.temperature * spec.temperature == 0
    for indices in [range(request.n)] if single_call else [[index] for index in range(request.n)]:
        if cancel.is_set():
            raise Cancelled
        start = time.perf_counter()
        fields = parse_answer(request, _generate(client, spec, request, photo))
        seconds = time.perf_counter() - start
        yield from (Answer(index, **fields, seconds=seconds, first_token_seconds=seconds) for index in indices)


def _generate(client: Any, spec: ModelSpec, request: Request, photo: Image.Image) -> dict[str, Any]:
    skill = request.skill
    settings: dict[str, Any] = {"max_objects": MAX_OBJECTS}
    if skill in MAX_TOKENS:
        temperature = request.temperature * spec.temperature
        settings = {"temperature": temperature, "top_p": spec.top_p, "max_tokens": MAX_TOKENS[skill]}
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
        raise InferenceError("failed", f"Photon failed ({type(error).__name__}). See the log for details.") from error
    raise InferenceError("unsupported", f"{spec.title} cannot {skill}. Choose a Moondream Cloud model.")


@lru_cache(maxsize=1)
def _client(model: str) -> Any:
    """Start the engine on first use."""
    import moondream  # optional, see requirements-gpu.txt

    return moondream.photon(model)
