"""What Moondream Cloud answers, played over real HTTP by the server of `faults`: for tests. It looks at no photo."""

from __future__ import annotations

import base64
import itertools
import json
import time
from typing import Any

import cv2
import numpy as np

from recipes import random_recipe
from tests.support.fault_server import KEY, Handler

MODELS = ("moondream3.1-9B-A2B", "moondream3-preview", "moondream9-new")
PATH = "M 0.1 0.2 L 0.8 0.2 C 0.9 0.5 0.5 0.9 0.1 0.8 Z"
METRICS = {"input_tokens": 740, "output_tokens": 12, "prefill_time_ms": 40.0, "decode_time_ms": 90.0, "ttft_ms": 5.0}
_SEEDS = itertools.count()
CAPTION = "A cat sits on a wall and looks at nobody."


def cloud(handler: Handler) -> None:
    """Answers any request with the right key; see `answer_to`."""
    if handler.headers.get("X-Moondream-Auth") != KEY:
        handler.send(
            401, json.dumps({"error": {"message": f"unknown key {handler.headers.get('X-Moondream-Auth')}"}}).encode()
        )
    elif handler.path.endswith("/models"):
        handler.send(200, json.dumps({"object": "list", "data": [{"id": name} for name in MODELS]}).encode())
    elif handler.body["model"].partition("/")[0] not in MODELS:
        handler.send(404, b'{"error": {"message": "no such model"}}')
    elif handler.body.get("stream"):
        _stream(handler, answer_to(handler))
    else:
        handler.send(200, json.dumps(answer_to(handler)).encode())


def answer_to(handler: Handler) -> dict[str, Any]:
    """The answer to a skill; a question that explains the grammar is answered with a recipe, each time another one."""
    head, _, data = handler.body["image_url"].partition(",")
    picture = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)
    assert head == "data:image/jpeg;base64" and picture is not None
    common = {"request_id": f"req-{len(handler.faults.asked)}", "metrics": METRICS}
    match handler.path.rpartition("/")[2]:
        case "caption":
            return common | {"caption": CAPTION, "finish_reason": "stop"}
        case "detect":
            return common | {"objects": [{"x_min": 0.1, "y_min": 0.2, "x_max": 0.5, "y_max": 0.6}, {"x_min": "?"}]}
        case "point":
            return common | {"points": [{"x": 0.25, "y": 1.75}, {"x": None, "y": 0}]}
        case "segment":
            return common | {"path": PATH, "bbox": {"x_min": 0.1, "y_min": 0.2, "x_max": 0.9, "y_max": 0.9}}
    if handler.body["question"].startswith("You are a photo editor"):
        rng = np.random.default_rng(next(_SEEDS))
        return {"answer": f"Sure! {random_recipe(rng)}", "request_id": "req-recipe"}
    answered = common | {"answer": "Two cats."}
    if handler.body.get("reasoning"):
        grounding = [{"start_idx": 6, "end_idx": 10, "points": [[0.3, 0.4], [0.6, 0.4]]}]
        answered["reasoning"] = {"text": "I see cats <b>here</b>.", "grounding": grounding}
    return answered


def _stream(handler: Handler, whole: dict[str, Any]) -> None:
    handler.begin()
    for word in whole.get("caption", whole.get("answer", "")).split(" "):
        handler.event(chunk=f"{word} ", completed=False)
        time.sleep(0.01)
    handler.event(completed=True, chunk="", request_id=whole["request_id"], metrics=whole.get("metrics"))
