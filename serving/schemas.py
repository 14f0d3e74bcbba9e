"""Request and response bodies of the /v1 API. The fields are those of Moondream Cloud's API.

Fields that only Moondream Cloud supports are ignored or rejected.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field, field_validator

from inference.types import (
    MAX_NEW_TOKENS,
    MAX_OBJECTS,
    MAX_PROMPT,
    MAX_TEMPERATURE,
    NO_PHOTO,
    Answer,
    Box,
    Point,
)
from recipes import PhotoError, data_url_content, load_photo, shrink
from serving.errors import ApiError

MAX_PIXELS = 24_000_000
MAX_SIDE = 2048  # pixels; larger photos are scaled down, since no local model uses more
DATA_URL_ONLY = (
    "image_url must be a data URL (data:image/jpeg;base64,...) of a JPEG, PNG or WebP; addresses are not fetched."
)
Text = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT)]
Limit = Annotated[int, Field(ge=1, le=1_000_000)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
SpatialRef = tuple[Fraction, Fraction] | tuple[Fraction, Fraction, Fraction, Fraction]
MAX_SPATIAL_REFS = 50


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

    model: Annotated[str, Field(max_length=200)] | None = None
    settings: SamplingSettings | None = None
    spatial_refs: Annotated[list[SpatialRef], Field(max_length=MAX_SPATIAL_REFS)] | None = Field(
        None, description="Points [x, y] and boxes [x_min, y_min, x_max, y_max], for models that can use them."
    )

    @property
    def refs(self) -> tuple[tuple[float, ...], ...]:
        """The spatial references."""
        return tuple(self.spatial_refs or ())


class QueryRequest(ApiRequest):
    """A question, about a photo or without one. `reasoning` is ignored by models that cannot reason."""

    image_url: str | None = Field(None, description=DATA_URL_ONLY)
    question: Text
    stream: bool = False
    reasoning: bool | None = None

    def photo(self) -> np.ndarray:
        """Decode the photo, uint8 [height, width, 3], or return `NO_PHOTO`. Raises ApiError (400)."""
        return NO_PHOTO if self.image_url is None else decode_photo(self.image_url)


class PhotoRequest(ApiRequest):
    """Fields of the skills that need a photo."""

    image_url: str = Field(description=DATA_URL_ONLY)

    def photo(self) -> np.ndarray:
        """Decode the photo, uint8 [height, width, 3]. Raises ApiError (400)."""
        return decode_photo(self.image_url)


class CaptionRequest(PhotoRequest):
    """A request for a caption."""

    length: Literal["short", "normal", "long"] = "normal"
    stream: bool = False


class RegionRequest(PhotoRequest):
    """A request for boxes or points of an object."""

    object: Text


class SegmentRequest(RegionRequest):
    """A request for the outline of an object."""

    stream: bool = False


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


class ReasoningResponse(BaseModel):
    """What a model reasoned before its answer."""

    text: str
    grounding: list[dict[str, Any]] = []


class QueryResponse(SkillResponse):
    """The answer to a question."""

    answer: str
    reasoning: ReasoningResponse | None = None


class CaptionResponse(SkillResponse):
    """A caption."""

    caption: str


class DetectResponse(SkillResponse):
    """Boxes of the detected objects."""

    objects: list[Box]


class PointResponse(SkillResponse):
    """Points on the objects."""

    points: list[Point]


class SegmentResponse(SkillResponse):
    """The outline of an object as SVG path data in fractions of the photo, and its box."""

    path: str
    bbox: Box | None = None


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
    try:
        data = data_url_content(url)
        if data is None:
            raise ApiError(400, DATA_URL_ONLY)
        return shrink(load_photo(data, MAX_PIXELS), MAX_SIDE)
    except PhotoError as error:
        raise ApiError(400, f"image_url cannot be read. {error}") from None


def query_fields(answer: Answer) -> dict[str, Any]:
    """Return the fields of `QueryResponse` beside those of `SkillResponse`."""
    reasoning = {"reasoning": {"text": answer.reasoning, "grounding": []}} if answer.reasoning else {}
    return {"answer": answer.text, **reasoning}


def caption_fields(answer: Answer) -> dict[str, Any]:
    """Return the fields of `CaptionResponse` beside those of `SkillResponse`."""
    return {"caption": answer.text}


def detect_fields(answer: Answer) -> dict[str, Any]:
    """Return the fields of `DetectResponse` beside those of `SkillResponse`."""
    return {"objects": [asdict(box) for box in answer.boxes]}


def point_fields(answer: Answer) -> dict[str, Any]:
    """Return the fields of `PointResponse` beside those of `SkillResponse`."""
    return {"points": [asdict(point) for point in answer.points]}


def segment_fields(answer: Answer) -> dict[str, Any]:
    """Return the fields of `SegmentResponse` beside those of `SkillResponse`."""
    return {"path": answer.path, "bbox": asdict(answer.boxes[0]) if answer.boxes else None}


def response_fields(answer: Answer, model: str, request_id: str) -> dict[str, Any]:
    """Return the fields of `SkillResponse` as JSON."""
    return {
        "request_id": request_id,
        "model": model,
        "finish_reason": "length" if answer.truncated else "stop",
        "metrics": ResponseMetrics.from_answer(answer).model_dump(),
    }
