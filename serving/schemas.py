"""Request and response bodies of the /v1 API. The fields are those of Moondream Cloud's API.

Fields that only Moondream Cloud supports are ignored or rejected.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field, field_validator

from inference.types import MAX_NEW_TOKENS, MAX_OBJECTS, MAX_PROMPT, MAX_TEMPERATURE, Answer, Box, Point
from recipes import PhotoError, load_photo, shrink
from serving.errors import ApiError

MAX_PIXELS = 24_000_000
MAX_SIDE = 2048  # pixels; larger photos are scaled down, since no local model uses more
DATA_URL = re.compile(r"data:image/(jpeg|jpg|png|webp);base64,", re.IGNORECASE)
DATA_URL_ONLY = (
    "image_url must be a data URL (data:image/jpeg;base64,...) of a JPEG, PNG or WebP; addresses are not fetched."
)
Text = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT)]
Limit = Annotated[int, Field(ge=1, le=1_000_000)]


class SamplingSettings(BaseModel):
    """Sampling settings. Values of max_tokens and max_objects above the supported maximum are reduced to it."""

    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE, allow_inf_nan=False)] = 0.2
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.9
    max_tokens: Limit = MAX_NEW_TOKENS
    max_objects: Limit = MAX_OBJECTS
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None

    @field_validator("max_tokens")
    @classmethod
    def _clamp_tokens(cls, value: int) -> int:
        return min(value, MAX_NEW_TOKENS)

    @field_validator("max_objects")
    @classmethod
    def _clamp_objects(cls, value: int) -> int:
        return min(value, MAX_OBJECTS)


class ApiRequest(BaseModel):
    """Fields of all skills. `model` is an id from GET /v1/models; the default is moondream-tiny."""

    image_url: str = Field(description=DATA_URL_ONLY)
    model: Annotated[str, Field(max_length=200)] | None = None
    settings: SamplingSettings | None = None
    spatial_refs: None = Field(None, description="Not supported. Omit this field.")

    def photo(self) -> np.ndarray:
        """Decode the photo, uint8 [height, width, 3]. Raises ApiError (400)."""
        return decode_photo(self.image_url)


class QueryRequest(ApiRequest):
    """A question about the photo. `reasoning` is accepted and ignored: local models do not reason."""

    question: Text
    stream: bool = False
    reasoning: bool | None = None


class CaptionRequest(ApiRequest):
    """A request for a caption."""

    length: Literal["short", "normal", "long"] = "normal"
    stream: bool = False


class RegionRequest(ApiRequest):
    """A request for boxes or points of an object."""

    object: Text


class ResponseMetrics(BaseModel):
    """Token counts, including image tokens, and times. `ttft_ms` includes the time in the queue."""

    input_tokens: int
    output_tokens: int
    prefill_time_ms: float
    decode_time_ms: float
    ttft_ms: float

    @classmethod
    def from_answer(cls, answer: Answer) -> ResponseMetrics:
        """Return the metrics of an answer."""
        prefill = answer.first_token_seconds
        return cls(
            input_tokens=answer.tokens_in,
            output_tokens=answer.tokens_out,
            prefill_time_ms=round(1000 * prefill, 3),
            decode_time_ms=round(1000 * max(0.0, answer.seconds - prefill), 3),
            ttft_ms=round(1000 * (answer.queue_seconds + prefill), 3),
        )


class SkillResponse(BaseModel):
    """Fields of all responses."""

    request_id: str
    model: str
    finish_reason: Literal["stop", "length"]
    metrics: ResponseMetrics


class QueryResponse(SkillResponse):
    """The answer to a question."""

    answer: str


class CaptionResponse(SkillResponse):
    """A caption."""

    caption: str


class DetectResponse(SkillResponse):
    """Boxes of the detected objects."""

    objects: list[Box]


class PointResponse(SkillResponse):
    """Points on the objects."""

    points: list[Point]


class ModelCard(BaseModel):
    """An available model."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "moondream-playground"
    name: str
    description: str


class ModelList(BaseModel):
    """The available models, the default one first."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def decode_photo(url: str) -> np.ndarray:
    """Decode the photo of a data URL.

    Args:
        url: Base64 data URL of a JPEG, PNG or WebP image.

    Returns:
        RGB image, uint8 [height, width, 3], whose longer side is at most `MAX_SIDE`.

    Raises:
        ApiError: The URL is not a data URL, or the photo cannot be decoded (400).
    """
    prefix = DATA_URL.match(url)
    if prefix is None:
        raise ApiError(400, DATA_URL_ONLY)
    try:
        data = base64.b64decode(url[prefix.end() :], validate=True)
        return shrink(load_photo(data, MAX_PIXELS), MAX_SIDE)
    except (binascii.Error, ValueError) as error:
        reason = str(error) if isinstance(error, PhotoError) else "It is not valid base64."
        raise ApiError(400, f"image_url cannot be read. {reason}") from None


def response_fields(answer: Answer, model: str, request_id: str) -> dict[str, Any]:
    """Return the fields of `SkillResponse` as JSON."""
    return {
        "request_id": request_id,
        "model": model,
        "finish_reason": "length" if answer.truncated else "stop",
        "metrics": ResponseMetrics.from_answer(answer).model_dump(),
    }
