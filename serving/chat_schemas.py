"""Request and response bodies of POST /v1/chat/completions, in OpenAI's shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from inference.types import MAX_CANDIDATES, MAX_SEED, MAX_STOPS, MAX_TEMPERATURE
from serving.errors import ApiError
from serving.schemas import DATA_URL_ONLY, Limit, SamplingSettings

MAX_MESSAGES = 100
MAX_STOP_LENGTH = 100
MAX_SCHEMA_DEPTH = 8  # of references in a JSON schema
BOX_NAMES, POINT_NAMES = {"x_min", "y_min", "x_max", "y_max"}, {"x", "y"}
SCHEMA_ONLY = (
    "response_format.json_schema must describe an object with one list of boxes (x_min, y_min, x_max, y_max) or of "
    "points (x, y): numbers from 0 to 1. Items may also have a string called label."
)
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class ImageUrl(BaseModel):
    """A photo as a data URL."""

    url: str = Field(description=DATA_URL_ONLY)


class TextPart(BaseModel):
    """A part of a message: text."""

    type: Literal["text"]
    text: str


class ImagePart(BaseModel):
    """A part of a message: a photo."""

    type: Literal["image_url"]
    image_url: ImageUrl


class Message(BaseModel):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] | None = None

    @property
    def text(self) -> str:
        """The text of the message."""
        if not isinstance(self.content, list):
            return (self.content or "").strip()
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart)).strip()

    @property
    def image_urls(self) -> list[str]:
        """The data URLs of the message's photos."""
        parts = self.content if isinstance(self.content, list) else []
        return [part.image_url.url for part in parts if isinstance(part, ImagePart)]


class StreamOptions(BaseModel):
    """Options of a stream."""

    include_usage: bool = False


class JsonSchema(BaseModel):
    """A JSON schema with its name."""

    model_config = ConfigDict(populate_by_name=True)

    name: str = ""
    json_schema: dict[str, Any] = Field({}, alias="schema")


class ResponseFormat(BaseModel):
    """The form of the answer: text, or boxes or points in the form of a JSON schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(BaseModel):
    """A conversation about at most one photo. Unknown fields are ignored; fields without effect here are rejected."""

    model: Annotated[str, Field(max_length=200)] | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Limit | None = None
    max_completion_tokens: Limit | None = None
    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CANDIDATES)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    response_format: ResponseFormat | None = None
    reasoning: bool | None = None
    tools: list[Any] | None = None
    logprobs: bool | None = None

    def sampling(self) -> SamplingSettings:
        """Return the sampling settings; those that are not sent have the defaults of /v1/query."""
        fields = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_completion_tokens or self.max_tokens,
            "seed": None if self.seed is None else self.seed % (MAX_SEED + 1),
        }
        return SamplingSettings(**{name: value for name, value in fields.items() if value is not None})

    def stops(self) -> tuple[str, ...]:
        """Return the texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def image_url(self) -> str | None:
        """Return the data URL of the photo, or None without one. Raises ApiError (400) if there are several."""
        urls = [url for message in self.messages for url in message.image_urls]
        if len(urls) > 1:
            raise ApiError(
                400,
                f"A request may have one photo in all of its messages; this one has {len(urls)}. Send one request "
                "for each photo.",
                param="messages",
            )
        return urls[0] if urls else None

    def question(self) -> str:
        """Return the text of the last message. Raises ApiError (400) if that is not the user's."""
        if self.messages[-1].role != "user":
            raise ApiError(400, "The last message must have the role user.", param="messages")
        return self.messages[-1].text

    def conversation(self) -> str:
        """Return the whole conversation as one prompt: instructions, then the turns with the names of their roles."""
        instructions = [message.text for message in self.messages if message.role in ("system", "developer")]
        turns = [message for message in self.messages if message.role in ("user", "assistant")]
        if len(turns) == 1:
            return "\n".join([*instructions, turns[0].text])
        return "\n".join([*instructions, *(f"{message.role.capitalize()}: {message.text}" for message in turns)])

    def regions(self) -> RegionFormat | None:
        """Return the form of the requested boxes or points, or None for text. Raises ApiError (400)."""
        if self.response_format is None or self.response_format.type == "text":
            return None
        if self.response_format.type == "json_object" or self.response_format.json_schema is None:
            message = f"response_format must be text or a json_schema. {SCHEMA_ONLY}"
            raise ApiError(400, message, param="response_format")
        return RegionFormat.from_schema(self.response_format.json_schema.json_schema)


@dataclass(frozen=True)
class RegionFormat:
    """The form of boxes or points in a JSON schema.

    Attributes:
        skill: detect or point.
        key: Name of the list.
        label: Whether its items have a label.
    """

    skill: Literal["detect", "point"]
    key: str
    label: bool

    @classmethod
    def from_schema(cls, schema: dict[str, Any]) -> RegionFormat:
        """Read a JSON schema. Raises ApiError (400) if it describes anything but boxes or points."""
        properties = _resolve(schema, schema).get("properties")
        if isinstance(properties, dict) and len(properties) == 1:
            key, items = next((key, _resolve(value, schema).get("items")) for key, value in properties.items())
            fields = _resolve(items, schema).get("properties")
            names = set(fields) if isinstance(fields, dict) else set()
            if names - {"label"} == BOX_NAMES:
                return cls("detect", key, "label" in names)
            if names - {"label"} == POINT_NAMES:
                return cls("point", key, "label" in names)
        raise ApiError(400, SCHEMA_ONLY, param="response_format")


def _resolve(schema: Any, root: dict[str, Any]) -> dict[str, Any]:
    """Return a part of a JSON schema with its references to `$defs` followed; {} if it is malformed."""
    for _ in range(MAX_SCHEMA_DEPTH):
        if not isinstance(schema, dict):
            return {}
        reference = schema.get("$ref")
        if not isinstance(reference, str):
            return schema
        group, _, name = reference.removeprefix("#/").partition("/")
        definitions = root.get(group)
        schema = definitions.get(name) if isinstance(definitions, dict) else None
    return {}


class ChatMessageResponse(BaseModel):
    """The answer. `reasoning` is what the model reasoned before it."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    reasoning: str | None = None


class Choice(BaseModel):
    """One of the `n` answers."""

    index: int
    message: ChatMessageResponse
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class TokenUsage(BaseModel):
    """Token counts, including image tokens. The prompt counts once, and every answer counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatResponse(BaseModel):
    """OpenAI's chat completion."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: TokenUsage
