"""What is sent and received: the fields of Moondream Cloud's API; those that it alone has are ignored or refused."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field, field_validator

from inference.types import MAX_NEW_TOKENS, MAX_OBJECTS, MAX_PROMPT, MAX_TEMPERATURE, Answer
from recipes import PhotoError, load_photo, shrink
from serving.errors import ApiError

MAX_PIXELS = 24_000_000
LONG_SIDE = 2048  # a photo is reduced to it: no model here sees more
DATA_URL = re.compile(r"data:image/(jpeg|jpg|png|webp);base64,", re.IGNORECASE)
NO_URL = "image_url must be a data URL (data:image/jpeg;base64,...) of a JPEG, PNG or WebP; addresses are not fetched."
Words = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]


class Sampling(BaseModel):
    """How an answer is drawn. max_tokens and max_objects beyond what can be given count as the most."""

    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE, allow_inf_nan=False)] = 0.2
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.9
    max_tokens: Count = MAX_NEW_TOKENS
    max_objects: Count = MAX_OBJECTS
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None

    @field_validator("max_tokens")
    @classmethod
    def _tokens(cls, value: int) -> int:
        return min(value, MAX_NEW_TOKENS)

    @field_validator("max_objects")
    @classmethod
    def _objects(cls, value: int) -> int:
        return min(value, MAX_OBJECTS)


class ApiRequest(BaseModel):
    """What all skills take. model: one of GET /v1/models, moondream-tiny where it is left out."""

    image_url: str = Field(description=NO_URL)
    model: Annotated[str, Field(max_length=200)] | None = None
    settings: Sampling | None = None
    spatial_refs: None = Field(None, description="Not supported: leave it out.")

    def photo(self) -> np.ndarray:
        """uint8 [H, W, 3] RGB. Raises ApiError (400) that says what to send."""
        return photo_of(self.image_url)


class QueryRequest(ApiRequest):
    """A question. reasoning is taken and without effect: no model here thinks first."""

    question: Words
    stream: bool = False
    reasoning: bool | None = None


class CaptionRequest(ApiRequest):
    """A caption of one of three lengths."""

    length: Literal["short", "normal", "long"] = "normal"
    stream: bool = False


class RegionRequest(ApiRequest):
    """Boxes around, or points on, every such object."""

    object: Words


class Metrics(BaseModel):
    """Tokens, the photo's among them, and milliseconds; ttft counts from the request's arrival at the queue."""

    input_tokens: int
    output_tokens: int
    prefill_time_ms: float
    decode_time_ms: float
    ttft_ms: float

    @classmethod
    def of(cls, answer: Answer) -> Metrics:
        """An answer's."""
        first, rest = answer.first_token_seconds, answer.seconds - answer.first_token_seconds
        times = (first, max(0.0, rest), answer.queue_seconds + first)
        return cls(
            input_tokens=answer.tokens_in,
            output_tokens=answer.tokens_out,
            **dict(zip(("prefill_time_ms", "decode_time_ms", "ttft_ms"), (round(1000 * time, 3) for time in times))),
        )


class Answered(BaseModel):
    """What all answers have."""

    request_id: str
    model: str
    finish_reason: Literal["stop", "length"]
    metrics: Metrics


class QueryAnswer(Answered):
    """The answer to a question."""

    answer: str


class CaptionAnswer(Answered):
    """A caption."""

    caption: str


class Region(BaseModel):
    """A box in shares of the photo's width and height, 0..1 from the top left corner."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float


class PointModel(BaseModel):
    """A point in shares of the photo's width and height, 0..1 from the top left corner."""

    x: float
    y: float


class DetectAnswer(Answered):
    """Boxes."""

    objects: list[Region]


class PointAnswer(Answered):
    """Points."""

    points: list[PointModel]


class ModelCard(BaseModel):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "moondream-playground"
    name: str
    description: str


class ModelList(BaseModel):
    """The models that can be asked, the default one first."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def photo_of(url: str) -> np.ndarray:
    """The photo of a data URL, uint8 [H, W, 3], at most LONG_SIDE long. Raises ApiError (400)."""
    head = DATA_URL.match(url)
    if head is None:
        raise ApiError(400, NO_URL)
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
        return shrink(load_photo(data, MAX_PIXELS), LONG_SIDE)
    except (binascii.Error, ValueError) as error:
        reason = str(error) if isinstance(error, PhotoError) else "It is no base64."
        raise ApiError(400, f"image_url cannot be read. {reason}") from None


def common(answer: Answer, model: str, request_id: str) -> dict[str, Any]:
    """The fields of `Answered`."""
    reason = "length" if answer.truncated else "stop"
    return {"request_id": request_id, "model": model, "finish_reason": reason, "metrics": Metrics.of(answer)}
