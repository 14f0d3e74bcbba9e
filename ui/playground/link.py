"""The Playground's settings, and their representation in the page's URL."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from inference.types import LENGTHS, MAX_CANDIDATES, MAX_PROMPT, MAX_SEED, MAX_TEMPERATURE, SKILLS, clean
from rewards import EQUAL_WEIGHTS, REWARDS, RewardFunction, RewardFunctionError
from ui.playground.picker import MAX_MODELS
from ui.playground.samples import SAMPLES

MAX_LINK = 6000  # characters of the query: Gradio repeats it in each request, and servers limit a request's first line
_LINK_JS = (Path(__file__).resolve().parent / "link.js").read_text(encoding="utf-8")


@dataclass(frozen=True)
class PlaygroundSettings:
    """The settings of the Playground that a link can contain.

    Attributes:
        photo: File name of a sample photo, or empty. A link never contains an uploaded photo.
        models: Keys of the models in MODELS.
        skill: Key of the skill in SKILLS.
        prompt: The prompt.
        length: Length of a caption, one of LENGTHS.
        n: Number of candidates per model.
        temperature: Sampling temperature.
        seed: Seed of the first candidate.
        reward: The reward function on the sliders.
    """

    photo: str = ""
    models: tuple[str, ...] = ("moondream-tiny", "moondream-tiny-balanced", "moondream-tiny-bold")
    skill: str = "recipe"
    prompt: str = ""
    length: str = "normal"
    n: int = 4
    temperature: float = 1.0
    seed: int = 1
    reward: RewardFunction = EQUAL_WEIGHTS


def read_link(query: Mapping[str, str], models: Collection[str]) -> tuple[PlaygroundSettings, list[str]]:
    """Parse and validate a query string.

    Args:
        query: The parameters.
        models: Names of the models that the visitor may select.

    Returns:
        The settings, and one message per invalid parameter. Invalid parameters keep their default.
    """
    values: dict[str, object] = {}
    problems: list[str] = []
    for name, parse in _parsers(models).items():
        text = query.get(name)
        if not text:
            continue
        try:
            values[name] = parse(text)
        except (ValueError, RewardFunctionError) as error:
            problems.append(f"{name}: {str(error)[:200]}")
    return PlaygroundSettings(**values), problems  # type: ignore[arg-type]


def _models_from(models: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(text[:1000].split(",")))
        if any(name not in models for name in names):
            raise ValueError("unknown model")
        if len(names) > MAX_MODELS:
            raise ValueError(f"at most {MAX_MODELS} models can be compared")
        return names

    return parse


def _parse_prompt(text: str) -> str:
    return clean(text)[:MAX_PROMPT]


def _parse_number(text: str, low: float, high: float) -> float:
    try:
        number = float(text[:40])
    except ValueError:
        raise ValueError("not a number") from None
    if not low <= number <= high:
        raise ValueError(f"must be from {low:g} to {high:,}")
    return number


def _one_of(names: Mapping[str, object] | tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return text

    return parse


def _parsers(models: Collection[str]) -> dict[str, Callable[[str], object]]:
    """Return the parser of each parameter. Raised errors are ValueError or RewardFunctionError."""
    return {
        "photo": _one_of(SAMPLES),
        "models": _models_from(models),
        "skill": _one_of(SKILLS),
        "prompt": _parse_prompt,
        "length": _one_of(LENGTHS),
        "n": lambda text: int(_parse_number(text, 1, MAX_CANDIDATES)),
        "temperature": lambda text: _parse_number(text, 0, MAX_TEMPERATURE),
        "seed": lambda text: int(_parse_number(text, 0, MAX_SEED)),
        "reward": RewardFunction.from_query,
    }


LINK_FIELDS = tuple(name for name in _parsers(()) if name != "reward")


def link_js(copy: bool) -> str:
    """Build the JavaScript event handler that writes the settings to the page's URL, without a prompt that is too long.

    Args:
        copy: Whether to copy the URL to the clipboard as well and to return a message about it.

    Returns:
        A function of the values of LINK_FIELDS, followed by the weight of each reward.
    """
    arguments = json.dumps([LINK_FIELDS, list(REWARDS), MAX_LINK, copy])
    return f"({_LINK_JS.strip()})(...{arguments})"
