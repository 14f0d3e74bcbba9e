"""A recipe: the edit itself, its operations with their ranges, its canonical text and the grammar of that text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from dataclasses import replace as _replace
from typing import Any

import numpy as np

LOOKS = ("none", "mono", "sepia", "fade", "teal", "noir")


@dataclass(frozen=True)
class Slot:
    """One whole number of an operation: its range, the step between the levels a model writes, its neutral value."""

    low: int
    high: int
    step: int
    neutral: int
    signed: bool = False

    def write(self, value: int) -> str:
        """The number as canonical text: '+10', '0', '-10' where signed, else '10'."""
        return f"{value:+d}" if self.signed and value else str(value)

    def levels(self) -> list[str]:
        """The texts a model may write, from low to high."""
        return [self.write(value) for value in range(self.low, self.high + 1, self.step)]

    def clamp(self, value: float) -> int:
        """The nearest whole number in range; infinities go to the ends. Raises ValueError for NaN."""
        if math.isnan(value):
            raise ValueError("not a number")
        return round(min(max(value, self.low), self.high))


@dataclass(frozen=True)
class Operation:
    """One operation: numbers (slots) or a choice among words, never both. `doc` says what it does."""

    name: str
    slots: tuple[Slot, ...] = ()
    choices: tuple[str, ...] = ()
    doc: str = ""


_SIGNED = Slot(-100, 100, 10, 0, signed=True)
_START, _END = Slot(0, 40, 5, 0), Slot(60, 100, 5, 100)

# In the order of the canonical text. A new operation is an entry here, a field of Recipe and its step in render.py.
OPERATIONS: dict[str, Operation] = {
    "crop": Operation("crop", (_START, _START, _END, _END), doc="left top right bottom, % of width and height"),
    "exposure": Operation("exposure", (_SIGNED,), doc="light; +100 is one and a half stops brighter"),
    "contrast": Operation("contrast", (_SIGNED,), doc="distance from middle grey; +100 doubles it"),
    "saturation": Operation("saturation", (_SIGNED,), doc="strength of the colours; +100 is 2.8 times"),
    "warmth": Operation("warmth", (_SIGNED,), doc="white balance; + is warmer, - is cooler"),
    "sharpening": Operation("sharpening", (Slot(0, 100, 10, 0),), doc="unsharp mask on luminance"),
    "look": Operation("look", choices=LOOKS, doc="a finished style on top"),
}


@dataclass(frozen=True)
class Recipe:
    """An edit. Numbers are clamped to their range and rounded; NaN, infinity or an unknown look raise ValueError."""

    crop: tuple[int, int, int, int] = (0, 0, 100, 100)
    exposure: int = 0
    contrast: int = 0
    saturation: int = 0
    warmth: int = 0
    sharpening: int = 0
    look: str = "none"

    def __post_init__(self) -> None:
        for name, operation in OPERATIONS.items():
            object.__setattr__(self, name, _checked(operation, getattr(self, name)))

    def __str__(self) -> str:
        return "; ".join(f"{name} {_written(op, getattr(self, name))}" for name, op in OPERATIONS.items())

    @property
    def is_identity(self) -> bool:
        """True when rendering changes nothing."""
        return self == Recipe()

    def replace(self, **changes: Any) -> Recipe:
        """A copy with some fields changed."""
        return _replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """A plain dict: numbers, a list of four for crop, a word for look."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"crop": list(self.crop)}


def _checked(operation: Operation, value: Any) -> Any:
    if operation.choices:
        if value not in operation.choices:
            raise ValueError(f"{operation.name} must be one of {', '.join(operation.choices)}, not {value!r}")
        return value
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    if len(values) != len(operation.slots):
        raise ValueError(f"{operation.name} takes {len(operation.slots)} number(s), not {len(values)}")
    numbers = tuple(
        _clamped(operation.name, slot, number) for slot, number in zip(operation.slots, values, strict=True)
    )
    return _alone(numbers)


def _alone(numbers: tuple[int, ...]) -> tuple[int, ...] | int:
    """One number stands by itself, several stay together."""
    return numbers[0] if len(numbers) == 1 else numbers


def _clamped(name: str, slot: Slot, value: Any) -> int:
    try:
        number = float(value)
    except OverflowError:
        return slot.high if value > 0 else slot.low
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, not {value!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, not {value!r}")
    return slot.clamp(number)


def _written(operation: Operation, value: Any) -> str:
    if operation.choices:
        return str(value)
    values = value if isinstance(value, tuple) else (value,)
    return " ".join(slot.write(number) for slot, number in zip(operation.slots, values, strict=True))


def grammar() -> list[list[str]]:
    """The canonical text as a sequence of segments, each a list of alternatives.

    "".join of one alternative per segment is canonical text; constrained decoding is built from this.
    """
    segments: list[list[str]] = []
    for position, (name, operation) in enumerate(OPERATIONS.items()):
        segments.append([f"; {name}" if position else name])
        for slot in operation.slots:
            segments.append([f" {level}" for level in slot.levels()])
        if operation.choices:
            segments.append([f" {choice}" for choice in operation.choices])
    return segments


def random_recipe(rng: np.random.Generator, touch: float = 0.5) -> Recipe:
    """A random recipe at the levels a model may write; the same generator state gives the same recipe.

    Each operation is left neutral with probability 1 - touch, otherwise each of its numbers is uniform over its levels
    (a crop's four sides, a look other than none). touch=1 draws all operations uniformly.
    """
    values: dict[str, Any] = {}
    for name, operation in OPERATIONS.items():
        if rng.random() >= touch:
            continue
        if operation.choices:
            values[name] = operation.choices[int(rng.integers(1, len(operation.choices)))]
        else:
            numbers = tuple(int(rng.choice(range(slot.low, slot.high + 1, slot.step))) for slot in operation.slots)
            values[name] = _alone(numbers)
    return Recipe(**values)


def describe(recipe: Recipe) -> str:
    """The recipe in a few words for a card: 'crop to 80 x 100 %, exposure +20, warmer +30', or 'untouched'."""
    if recipe.is_identity:
        return "untouched"
    words: list[str] = []
    if recipe.crop != (0, 0, 100, 100):
        left, top, right, bottom = recipe.crop
        words.append(f"crop to {right - left} x {bottom - top} %")
    words += [
        f"{name} {getattr(recipe, name):+d}" for name in ("exposure", "contrast", "saturation") if getattr(recipe, name)
    ]
    if recipe.warmth:
        words.append(f"{'warmer' if recipe.warmth > 0 else 'cooler'} {recipe.warmth:+d}")
    if recipe.sharpening:
        words.append(f"sharpening {recipe.sharpening}")
    if recipe.look != "none":
        words.append(f"{recipe.look} look")
    return ", ".join(words)
