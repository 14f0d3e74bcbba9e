"""Types of the inference API: model specs, skills, requests, events and errors. Imports no torch."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from pydantic import SecretStr

import recipes

MAX_CANDIDATES = 8
MAX_TEMPERATURE = 2.0
MAX_SEED = 2**31 - 1
MAX_PROMPT = 2_000
MAX_NEW_TOKENS = 768
MAX_OBJECTS = 50
MAX_STOPS = 4
NO_PHOTO = np.zeros((0, 0, 3), np.uint8)
LENGTHS = ("short", "normal", "long")
RECIPE_QUESTION = "How should this photo be finished?"

CLOUD_URL = "https://api.moondream.ai/v1"
DEFAULT_RATE = 2.0  # requests per second and key; Moondream Cloud allows 10 with a balance of at least $10


@dataclass(frozen=True)
class ModelSpec:
    """A registered model: where its weights or its server are, and how it is sampled.

    Attributes:
        name: Key in `registry.MODELS`.
        title: Name shown in the interface.
        note: Description shown in the interface.
        backend: Key in `registry.BACKENDS`.
        source: Folder or Hugging Face Hub repository of the weights. Hosted models: base URL of the server, up to /v1.
        revision: Revision of the Hub repository.
        tokenizer: Hub repository of the tokenizer, if it is not in `source`.
        folder_variable: Environment variable that names a local folder to load instead of the repository.
        adapter: Folder of a PEFT adapter to apply to the weights.
        temperature: Factor applied to the temperature of each request.
        top_p: Nucleus sampling threshold, in (0, 1].
        grammar_constrained: Whether recipes are decoded under the recipe grammar. If not, the text is parsed leniently.
        grammar_in_prompt: Whether the prompt explains the recipe grammar (for models not trained on recipes).
        needs_gpu: Whether the model is unavailable without a GPU.
        memory_bytes: Free main memory needed to load the weights.
        segments: Whether the model has the skill `segment`.
        reasons: Whether the model can reason before it answers a question.
        spatial_refs: Whether prompts may refer to points and boxes.
        remote_id: Id of a hosted model on its server, if it differs from `name`.
        key: API key of the server of a hosted model.
        needs_key: Whether the server of a hosted model requires a key.
        rate: Maximum number of requests per second to the server of a hosted model.
    """

    name: str
    title: str
    note: str
    backend: str
    source: str
    revision: str | None = None
    tokenizer: str | None = None
    folder_variable: str | None = None
    adapter: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    grammar_constrained: bool = True
    grammar_in_prompt: bool = False
    needs_gpu: bool = False
    memory_bytes: int = 0
    segments: bool = False
    reasons: bool = False
    spatial_refs: bool = False
    remote_id: str = ""
    key: SecretStr | None = field(default=None, repr=False)
    needs_key: bool = False
    rate: float = DEFAULT_RATE

    def with_key(self, key: SecretStr | None) -> ModelSpec:
        """Return a copy that uses `key`. Unchanged if `key` is empty or the server requires no key."""
        return replace(self, key=key) if key and self.needs_key else self


@dataclass(frozen=True)
class Skill:
    """A task that a model can perform on a photo.

    Attributes:
        name: Key in `SKILLS`.
        title: Name shown in the interface.
        output: Content of the answers: a recipe to render, text, or regions (boxes, points or an outline).
        prompt: Whether a prompt is required, optional or ignored.
        placeholder: Hint for an empty prompt field.
        default_prompt: Initial prompt in the interface; also replaces an empty optional prompt.
    """

    name: str
    title: str
    output: Literal["recipe", "text", "regions"]
    prompt: Literal["none", "optional", "required"]
    placeholder: str = ""
    default_prompt: str = ""


SKILLS: dict[str, Skill] = {
    "recipe": Skill("recipe", "Recipe", "recipe", "optional", "Describe the edit (optional)", RECIPE_QUESTION),
    "query": Skill("query", "Question", "text", "required", "Ask about the photo", "Is the photo bright or dark?"),
    "caption": Skill("caption", "Caption", "text", "none"),
    "detect": Skill("detect", "Detect", "regions", "required", "Object to detect", "the main subject"),
    "point": Skill("point", "Point", "regions", "required", "Object to point at", "the brightest area"),
    "segment": Skill("segment", "Segment", "regions", "required", "Object to outline", "the main subject"),
}


@dataclass(frozen=True)
class Box:
    """A rectangle in fractions of the photo's width and height, 0..1, with the origin at the top left."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float


@dataclass(frozen=True)
class Point:
    """A point in fractions of the photo's width and height, 0..1, with the origin at the top left."""

    x: float
    y: float


class RequestError(ValueError):
    """Raised for invalid request parameters. The message tells the user what to change."""


@dataclass(frozen=True, eq=False)
class Request:
    """A validated request to run one skill on one photo.

    Attributes:
        photo: RGB image, uint8 [height, width, 3], or `NO_PHOTO` for a question without a photo.
        skill: Key in `SKILLS`.
        prompt: Prompt; control characters are removed.
        length: Caption length, one of `LENGTHS`.
        n: Number of candidates, 1..8.
        temperature: Sampling temperature, 0..2. At 0 decoding is greedy and all candidates are equal.
        seed: Random seed, 0..2**31-1. Candidate i is sampled with `seed + i`, independently of `n`.
        reasoning: Whether the model reasons before it answers a question. Hosted models only.
        max_tokens: Maximum number of generated tokens per text, 1..768. Local models only.
        max_objects: Maximum number of boxes or points, 1..50. Local models only.
        stop: Texts that end an answer; the answer does not contain them. At most `MAX_STOPS`.
        spatial_refs: Points (x, y) and boxes (x_min, y_min, x_max, y_max) that the prompt refers to, in fractions of
            the photo. Only for models with `ModelSpec.spatial_refs`.

    Raises:
        RequestError: If a value is invalid.
    """

    photo: np.ndarray = field(repr=False)
    skill: str
    prompt: str = ""
    length: str = "normal"
    n: int = 1
    temperature: float = 1.0
    seed: int = 0
    reasoning: bool = False
    max_tokens: int = MAX_NEW_TOKENS
    max_objects: int = MAX_OBJECTS
    stop: tuple[str, ...] = ()
    spatial_refs: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.skill not in SKILLS:
            raise RequestError(f"Unknown skill {self.skill!r}. Choose one of {', '.join(SKILLS)}.")
        if self.has_photo or self.skill != "query":
            _check_photo(self.photo)
        if self.length not in LENGTHS:
            raise RequestError(f"The length must be one of {', '.join(LENGTHS)}.")
        for name, value in {
            "prompt": _clean_prompt(SKILLS[self.skill], self.prompt),
            "n": _integer("number of candidates", self.n, 1, MAX_CANDIDATES),
            "temperature": _temperature(self.temperature),
            "seed": _integer("seed", self.seed, 0, MAX_SEED),
            "max_tokens": _integer("number of tokens", self.max_tokens, 1, MAX_NEW_TOKENS),
            "max_objects": _integer("number of objects", self.max_objects, 1, MAX_OBJECTS),
        }.items():
            object.__setattr__(self, name, value)

    @property
    def has_photo(self) -> bool:
        """Whether the request has a photo. Only questions may have none."""
        return self.photo is not NO_PHOTO

    def cut_at_stop(self, text: str) -> tuple[str, bool]:
        """Return a text up to the first of the texts in `stop`, and whether it contained one."""
        ends = [end for stop in self.stop if (end := text.find(stop)) >= 0]
        return (text[: min(ends)].rstrip(), True) if ends else (text, False)


@dataclass(frozen=True)
class Queued:
    """The request waits for the device. `position` is the number of requests ahead; 0 means that it runs next."""

    position: int


@dataclass(frozen=True)
class TextUpdate:
    """The text generated so far for candidate `index`."""

    index: int
    text: str


@dataclass(frozen=True)
class Answer:
    """A finished candidate.

    Attributes:
        index: Index of the candidate, 0..n-1.
        text: Generated text.
        boxes: Detected boxes.
        points: Detected points. With `reasoning`: the points that the reasoning refers to.
        tokens_in: Prompt tokens, including image tokens.
        tokens_out: Generated tokens.
        seconds: Time from the start of generation to the last token of this candidate.
        first_token_seconds: Time from the start of generation to the first token.
        queue_seconds: Time spent waiting before generation, without that of a cold start.
        cold_start_seconds: Time in which the model was loaded before generation; None if it was loaded, or unknown.
        path: Outline as SVG path data, in fractions of the photo.
        reasoning: Reasoning text that precedes the answer.
        grounded: Spans (start, end) of `reasoning` that refer to points on the photo.
        estimated: Whether the token counts are estimates.
        request_id: Id assigned by the provider.
        possible_extra_charges: Number of failed attempts that the provider may have charged as well.
        truncated: Whether the limit on tokens or objects ended the answer.
    """

    index: int
    text: str
    boxes: tuple[Box, ...] = ()
    points: tuple[Point, ...] = ()
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    first_token_seconds: float = 0.0
    queue_seconds: float = 0.0
    cold_start_seconds: float | None = None
    path: str = ""
    reasoning: str = ""
    grounded: tuple[tuple[int, int], ...] = ()
    estimated: bool = False
    request_id: str = ""
    possible_extra_charges: int = 0
    truncated: bool = False


@dataclass(frozen=True)
class CandidateFailed:
    """Candidate `index` failed; the others may still succeed. `message` tells the user what to do."""

    index: int
    message: str


AnswerEvent = Queued | TextUpdate | Answer | CandidateFailed


class InferenceError(Exception):
    """Raised when a model cannot answer.

    Attributes:
        kind: Error code: unknown_model, unavailable, missing_weights, bad_weights, wrong_tokenizer, unsupported,
            too_long, out_of_memory, cancelled, budget, provider or failed.
        message: Message that tells the user what to do.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


def skill_of_question(question: str) -> tuple[str, str]:
    """Return the skill and the prompt of a question to the API.

    `RECIPE_QUESTION` asks for a recipe, and words after it are instructions. Everything else is a query.
    """
    if not question.startswith(RECIPE_QUESTION):
        return "query", question
    return "recipe", question.removeprefix(RECIPE_QUESTION).strip() or RECIPE_QUESTION


def recipe_prompt(instructions: str = "") -> str:
    """Build the prompt that explains the recipe grammar to a model that was not trained on recipes.

    Args:
        instructions: The user's instructions. Ignored if empty or equal to `RECIPE_QUESTION`.
    """
    ranges = "; ".join(
        f"{name} ({_range(operation)}: {operation.doc})" for name, operation in recipes.OPERATIONS.items()
    )
    wish = "" if instructions in ("", RECIPE_QUESTION) else f" The wish: {instructions}"
    return (
        "You are a photo editor. Say how this photo should be finished, as one line in exactly this form, with your "
        f"own values: {recipes.Recipe(crop=(5, 0, 95, 100), exposure=20, contrast=10, warmth=-10, sharpening=30)}. "
        f"The operations and their ranges: {ranges}. Answer with the line alone.{wish}"
    )


def _range(operation: recipes.Operation) -> str:
    if operation.choices:
        return " or ".join(operation.choices)
    return ", ".join(f"{slot.low} to {slot.high}" for slot in operation.slots)


def clean(text: str) -> str:
    """Strip whitespace, control characters, lone surrogates and bidirectional formatting characters from a text."""
    kept = (" " if char in "\n\r\t" else char for char in str(text) if char in "\n\r\t" or not _is_control(char))
    return "".join(kept).strip()


def _is_control(char: str) -> bool:
    """Whether a character is in category Cc or Cs or is a bidirectional embedding, override or isolate."""
    return unicodedata.category(char) in ("Cc", "Cs") or "\u202a" <= char <= "\u202e" or "\u2066" <= char <= "\u2069"


def _clean_prompt(skill: Skill, prompt: str | None) -> str:
    text = clean(prompt or "")
    if skill.prompt == "none":
        return ""
    if len(text) > MAX_PROMPT:
        raise RequestError(f"The prompt has {len(text):,} characters; the limit is {MAX_PROMPT:,}. Shorten it.")
    if not text and skill.prompt == "required":
        raise RequestError(f"{skill.title} needs a prompt, for example “{skill.default_prompt}”.")
    return text or skill.default_prompt


def _check_photo(photo: np.ndarray) -> None:
    if not isinstance(photo, np.ndarray) or photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3:
        raise RequestError("There is no photo. Choose one first.")
    if photo is NO_PHOTO:
        raise RequestError("This needs a photo. Only questions are answered without one.")
    if 0 in photo.shape:
        raise RequestError("The photo is empty. Choose another one.")


def _integer(name: str, value: float, low: int, high: int) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = low - 1
    if number != value or not low <= number <= high:
        raise RequestError(f"The {name} must be a whole number from {low} to {high}.")
    return number


def _temperature(value: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number <= MAX_TEMPERATURE:
        raise RequestError(f"The temperature must be a number from 0 to {MAX_TEMPERATURE:g}.")
    return number
