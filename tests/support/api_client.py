"""Helpers for tests of the HTTP API: a photo as a data URL, and the documented shape of errors."""

from __future__ import annotations

import base64
import io

import httpx
import numpy as np
from PIL import Image


def make_picture(width: int = 96, height: int = 64) -> Image.Image:
    """Return a picture of noise, the same at every call."""
    return Image.fromarray(np.random.default_rng(3).integers(0, 255, (height, width, 3), dtype=np.uint8))


def data_url(image: Image.Image, kind: str = "jpeg") -> str:
    """Encode an image as a data URL."""
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


PHOTO_URL = data_url(make_picture())


def error_message(response: httpx.Response, status: int, kind: str) -> str:
    """Assert that a response is an error of this status and type; return its message."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"type", "message", "request_id"} and error["type"] == kind
    assert error["request_id"] == response.headers["x-request-id"]
    return error["message"]
