"""A fake Moondream Cloud: a response of `fault_server` with fixed answers and random recipes."""

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
CAPTION = "A cat sits on a wall and looks at a bird."


def cloud(handler: Handler) -> None:
    """Respond to any endpoint as Moondream Cloud does. Requires the key."""
    if handler.headers.get("X-Moondream-Auth") != KEY:
        handler.send(
            401, json.dumps({"error": {"message": f"unknown key {handler.headers.get('X-Moondream-Auth')}"}}).encode()
        )
    elif handler.path.endswith("/models"):
        handler.send(200, json.dumps({"object": "list", "data": [{"id": name} for name in MODELS]}).encode())
    elif handler.body["model"].partition("/")[0] not in MODELS:
        handler.send(404, b'{"error": {"message": "no such model"}}')
    elif handler.body.get("stream"):
        _stream(handler, response_payload(handler))
    else:
        handler.send(200, json.dumps(response_payload(handler)).encode())


def response_payload(handler: Handler) -> dict[str, Any]:
    """Return the response to a skill. A question that explains the recipe grammar gets a new random recipe."""
    prefix, _, data = handler.body["image_url"].partition(",")
    image = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)
    assert prefix == "data:image/jpeg;base64" and image is not None
    common = {"request_id": f"req-{len(handler.server_state.requests)}", "metrics": METRICS}
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
    payload = common | {"answer": "Two cats."}
    if handler.body.get("reasoning"):
        grounding = [{"start_idx": 6, "end_idx": 10, "points": [[0.3, 0.4], [0.6, 0.4]]}]
        payload["reasoning"] = {"text": "I see cats <b>here</b>.", "grounding": grounding}
    return payload


def _stream(handler: Handler, payload: dict[str, Any]) -> None:
    handler.begin_stream()
    for word in payload.get("caption", payload.get("answer", "")).split(" "):
        handler.send_event(chunk=f"{word} ", completed=False)
        time.sleep(0.01)
    handler.send_event(completed=True, chunk="", request_id=payload["request_id"], metrics=payload.get("metrics"))
