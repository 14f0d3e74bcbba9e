"""What can be asked of a model and what comes back: skills, requests, events and errors. No torch here."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

import recipes

MAX_CANDIDATES = 8
MAX_TEMPERATURE = 2.0
MAX_SEED = 2**31 - 1
MAX_PROMPT = 2_000
MAX_NEW_TOKENS = 768
MAX_OBJECTS = 50
LENGTHS = ("short", "normal", "long")
RECIPE_QUESTION = "How should this photo be finished?"


@dataclass(frozen=True)
class Skill:
    """One way of asking. `output` is what an answer holds: a recipe to render, text, or regions (boxes or points).

    `prompt` tells whether words are needed. `default_prompt` is what a screen may fill in at first, and what is
    asked when an optional prompt is left empty.
    """

    name: str
    title: str
    output: Literal["recipe", "text", "regions"]
    prompt: Literal["none", "optional", "required"]
    placeholder: str = ""
    default_prompt: str = ""


SKILLS: dict[str, Skill] = {
    "recipe": Skill("recipe", "Recipe", "recipe", "optional", "Leave empty, or say what you wish", RECIPE_QUESTION),
    "query": Skill("query", "Question", "text", "required", "Ask about the photo", "Is the photo bright or dark?"),
    "caption": Skill("caption", "Caption", "text", "none"),
    "detect": Skill("detect", "Detect", "regions", "required", "What to put a box around", "the main subject"),
    "point": Skill("point", "Point", "regions", "required", "What to point at", "the brightest area"),
    "segment": Skill("segment", "Segment", "regions", "required", "What to outline", "the main subject"),
}


@dataclass(frozen=True)
class Box:
    """A rectangle; coordinates are shares of the photo's width and height, 0..1 from the top left corner."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float


@dataclass(frozen=True)
class Point:
    """A spot; coordinates are shares of the photo's width and height, 0..1 from the top left corner."""

    x: float
    y: float


class RequestError(ValueError):
    """A request that cannot be asked; the message says what to change."""


@dataclass(frozen=True, eq=False)
class Request:
    """One question about one photo, checked when it is made: RequestError says in plain words what is wrong.

    photo: uint8 [height, width, 3], RGB. n: candidates, 1..8. temperature: 0 (always the likeliest word, so all
    candidates are the same) to 2. seed: 0..2**31-1; candidate i is drawn with seed + i, whatever n is, so the
    fourth card of seed 7 is the first card of seed 10. The prompt is cleaned of control characters. reasoning: whether
    a question is thought over first; only hosted models do. max_tokens: of a text, 1..768, and max_objects: boxes or
    points, 1..50, at most; only local models are told.
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

    def __post_init__(self) -> None:
        _check_photo(self.photo)
        if self.skill not in SKILLS:
            raise RequestError(f"There is no skill called {self.skill!r}. Choose one of {', '.join(SKILLS)}.")
        if self.length not in LENGTHS:
            raise RequestError(f"The length must be one of {', '.join(LENGTHS)}.")
        for name, value in {
            "prompt": _prompt(SKILLS[self.skill], self.prompt),
            "n": _whole("number of candidates", self.n, 1, MAX_CANDIDATES),
            "temperature": _temperature(self.temperature),
            "seed": _whole("seed", self.seed, 0, MAX_SEED),
            "max_tokens": _whole("number of tokens", self.max_tokens, 1, MAX_NEW_TOKENS),
            "max_objects": _whole("number of objects", self.max_objects, 1, MAX_OBJECTS),
        }.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Queued:
    """The request has to wait: `position` others are before it; 0 means that it is about to run."""

    position: int


@dataclass(frozen=True)
class TextUpdate:
    """All the text of candidate `index` so far."""

    index: int
    text: str


@dataclass(frozen=True)
class Answer:
    """Candidate `index`, finished. Times in seconds.

    `seconds` counts from the start of the computing to this candidate's last token, `first_token_seconds` to its
    first one; `queue_seconds` was spent waiting before. `tokens_in` counts the image's tokens, too.

    path: an outline as SVG path data in shares of the photo. reasoning: what was thought first, with the spans of it
    (from, to) that `points` show on the photo. estimated: the tokens are an estimate. request_id: the provider's.
    perhaps_charged: earlier tries that were lost and may have been charged as well. cut: whether a limit of tokens or
    objects ended it.
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
    path: str = ""
    reasoning: str = ""
    grounded: tuple[tuple[int, int], ...] = ()
    estimated: bool = False
    request_id: str = ""
    perhaps_charged: int = 0
    cut: bool = False


@dataclass(frozen=True)
class CandidateFailed:
    """Candidate `index` could not be answered, while others may be; the message tells a person what to do."""

    index: int
    message: str


Event = Queued | TextUpdate | Answer | CandidateFailed


class InferenceError(Exception):
    """A model could not answer. `kind` is for programs, the message tells a person what to do.

    Kinds: unknown_model, unavailable, missing_weights, bad_weights, wrong_tokenizer, unsupported, too_long,
    out_of_memory, cancelled, provider, failed.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


def recipe_prompt(wish: str = "") -> str:
    """The question that explains the grammar to a model that was not trained to write recipes.

    wish: what the user asked for; the default question counts as no wish.
    """
    ranges = "; ".join(
        f"{name} ({_range(operation)}: {operation.doc})" for name, operation in recipes.OPERATIONS.items()
    )
    wish = "" if wish in ("", RECIPE_QUESTION) else f" The wish: {wish}"
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
    """The text without control characters, lone surrogates and marks that turn the direction of writing around."""
    kept = (" " if mark in "\n\r\t" else mark for mark in str(text) if mark in "\n\r\t" or not _is_control(mark))
    return "".join(kept).strip()


def _is_control(mark: str) -> bool:
    """Categories Cc and Cs, and the bidirectional embeddings, overrides and isolates of Unicode."""
    return unicodedata.category(mark) in ("Cc", "Cs") or "\u202a" <= mark <= "\u202e" or "\u2066" <= mark <= "\u2069"


def _prompt(skill: Skill, prompt: str | None) -> str:
    text = clean(prompt or "")
    if skill.prompt == "none":
        return ""
    if len(text) > MAX_PROMPT:
        raise RequestError(f"The prompt has {len(text):,} characters, and {MAX_PROMPT:,} can be read. Shorten it.")
    if not text and skill.prompt == "required":
        raise RequestError(f"{skill.title} needs a prompt: {skill.placeholder[0].lower()}{skill.placeholder[1:]}.")
    return text or skill.default_prompt


def _check_photo(photo: np.ndarray) -> None:
    if not isinstance(photo, np.ndarray) or photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3:
        raise RequestError("There is no photo to look at. Choose one first.")
    if 0 in photo.shape:
        raise RequestError("The photo is empty. Choose another one.")


def _whole(what: str, value: float, low: int, high: int) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = low - 1
    if number != value or not low <= number <= high:
        raise RequestError(f"The {what} must be a whole number from {low} to {high}.")
    return number


def _temperature(value: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number <= MAX_TEMPERATURE:
        raise RequestError(f"The temperature must be a number from 0 to {MAX_TEMPERATURE:g}.")
    return number
