"""A page's settings as its address carries them: read from the query string, checked, never trusted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from inference.registry import MODELS
from inference.types import LENGTHS, MAX_CANDIDATES, MAX_PROMPT, MAX_SEED, MAX_TEMPERATURE, SKILLS, clean
from rewards import EQUAL_WEIGHTS, RewardFunction, RewardFunctionError
from ui.playground.picker import MAX_MODELS
from ui.playground.samples import SAMPLES


@dataclass(frozen=True)
class PlaygroundSettings:
    """All that a link can say. `photo` is the file name of a sample photo, or empty: uploads are never in a link."""

    photo: str = ""
    models: tuple[str, ...] = ("moondream-tiny", "moondream-tiny-steady")
    skill: str = "recipe"
    prompt: str = ""
    length: str = "normal"
    n: int = 4
    temperature: float = 1.0
    seed: int = 1
    reward: RewardFunction = EQUAL_WEIGHTS


def read_link(query: Mapping[str, str]) -> tuple[PlaygroundSettings, list[str]]:
    """The settings of a query string, and in plain words what in it was not understood and is left at its default."""
    values: dict[str, object] = {}
    problems: list[str] = []
    for name, read in _READERS.items():
        text = query.get(name)
        if not text:
            continue
        try:
            values[name] = read(text)
        except (ValueError, RewardFunctionError) as error:
            problems.append(f"{name}: {str(error)[:200]}")
    return PlaygroundSettings(**values), problems  # type: ignore[arg-type]


def _photo(text: str) -> str:
    if text not in SAMPLES:
        raise ValueError("there is no such sample photo")
    return text


def _models(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text[:1000].split(",")))
    if any(name not in MODELS for name in names):
        raise ValueError("there is no such model")
    if len(names) > MAX_MODELS:
        raise ValueError(f"at most {MAX_MODELS} models can be compared")
    return names


def _skill(text: str) -> str:
    if text not in SKILLS:
        raise ValueError("there is no such skill")
    return text


def _length(text: str) -> str:
    if text not in LENGTHS:
        raise ValueError(f"one of {', '.join(LENGTHS)} was expected")
    return text


def _prompt(text: str) -> str:
    return clean(text)[:MAX_PROMPT]


def _number(text: str, low: float, high: float) -> float:
    try:
        number = float(text[:40])
    except ValueError:
        raise ValueError("a number was expected") from None
    if not low <= number <= high:
        raise ValueError(f"a number from {low:g} to {high:,} was expected")
    return number


_READERS: dict[str, Callable[[str], object]] = {
    "photo": _photo,
    "models": _models,
    "skill": _skill,
    "prompt": _prompt,
    "length": _length,
    "n": lambda text: int(_number(text, 1, MAX_CANDIDATES)),
    "temperature": lambda text: _number(text, 0, MAX_TEMPERATURE),
    "seed": lambda text: int(_number(text, 0, MAX_SEED)),
    "reward": RewardFunction.from_query,
}

LINKED = tuple(name for name in _READERS if name != "reward")


def link_js(rewards: list[str], now: bool) -> str:
    """The function that writes the settings into the address; with `now` it also copies it and returns what it did.

    Its arguments: the values of LINKED, then a weight for each reward.
    """
    code = (Path(__file__).resolve().parent / "link.js").read_text(encoding="utf-8")
    values = {"NAMES": list(LINKED), "REWARDS": rewards, "NOW": now}
    code = "\n".join(line for line in code.splitlines() if not line.startswith("//"))
    for name, value in values.items():
        code = re.sub(rf"\b{name}\b", json.dumps(value), code)
    return code
