"""Recipe: an edit of a photo as validated values, with its canonical text, JSON, a random sampler and a description."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from dataclasses import replace as _replace
from typing import Any

import numpy as np

from recipes.grammar import OPERATIONS, Operation, Slot


@dataclass(frozen=True)
class Recipe:
    """An edit of a photo. `str(recipe)` is its canonical text.

    Numbers are clamped to their range and rounded.

    Attributes:
        crop: Left, top, right, bottom in percent of the photo's width and height.
        exposure: -100..100; +100 is 1.5 stops brighter.
        contrast: -100..100.
        saturation: -100..100.
        warmth: -100..100; positive is warmer.
        sharpening: 0..100.
        look: One of `LOOKS`.

    Raises:
        ValueError: For NaN, infinity, a value that is no number, or an unknown look.
    """

    crop: tuple[int, int, int, int] = (0, 0, 100, 100)
    exposure: int = 0
    contrast: int = 0
    saturation: int = 0
    warmth: int = 0
    sharpening: int = 0
    look: str = "none"

    def __post_init__(self) -> None:
        for name, operation in OPERATIONS.items():
            object.__setattr__(self, name, _validate(operation, getattr(self, name)))

    def __str__(self) -> str:
        parts = []
        for name, operation in OPERATIONS.items():
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else (value,)
            written = [slot.format(number) for slot, number in zip(operation.slots, numbers, strict=False)]
            parts.append(" ".join([name, *(written or [str(value)])]))
        return "; ".join(parts)

    @property
    def is_identity(self) -> bool:
        """Whether rendering leaves the photo unchanged."""
        return self == Recipe()

    def replace(self, **changes: Any) -> Recipe:
        """Return a copy with some fields changed."""
        return _replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Return a dict of numbers, a list of four numbers for `crop`, and a string for `look`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"crop": list(self.crop)}


def _validate(operation: Operation, value: Any) -> Any:
    """Return an operation's value clamped and rounded: one number, a tuple of numbers, or a word."""
    if operation.choices:
        if value not in operation.choices:
            raise ValueError(f"{operation.name} must be one of {', '.join(operation.choices)}, not {value!r}")
        return value
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    if len(values) != len(operation.slots):
        raise ValueError(f"{operation.name} takes {len(operation.slots)} number(s), not {len(values)}")
    return _unwrap(tuple(_clamp(operation.name, slot, v) for slot, v in zip(operation.slots, values, strict=True)))


def _unwrap(numbers: tuple[int, ...]) -> tuple[int, ...] | int:
    """Return the number of a one-element tuple, longer tuples unchanged."""
    return numbers[0] if len(numbers) == 1 else numbers


def _clamp(name: str, slot: Slot, value: Any) -> int:
    try:
        number = float(value)
    except OverflowError:
        return slot.high if value > 0 else slot.low
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, not {value!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, not {value!r}")
    return slot.clamp(number)


def random_recipe(rng: np.random.Generator, change_probability: float = 0.5) -> Recipe:
    """Draw a random recipe on the levels of the grammar.

    Args:
        rng: Source of randomness; the same state gives the same recipe.
        change_probability: Probability, per operation, that its values are drawn uniformly (a look other than none)
            instead of left neutral.
    """
    values: dict[str, Any] = {}
    for name, operation in OPERATIONS.items():
        if rng.random() >= change_probability:
            continue
        if operation.choices:
            values[name] = operation.choices[int(rng.integers(1, len(operation.choices)))]
        else:
            values[name] = _unwrap(tuple(int(rng.choice(slot.levels())) for slot in operation.slots))
    return Recipe(**values)


def describe(recipe: Recipe) -> str:
    """Describe a recipe in a few words: 'crop to 80 x 100 %, exposure +20, warmer +30', or 'untouched'."""
    if recipe.is_identity:
        return "untouched"
    parts: list[str] = []
    if recipe.crop != (0, 0, 100, 100):
        left, top, right, bottom = recipe.crop
        parts.append(f"crop to {right - left} x {bottom - top} %")
    parts += [
        f"{name} {getattr(recipe, name):+d}" for name in ("exposure", "contrast", "saturation") if getattr(recipe, name)
    ]
    if recipe.warmth:
        parts.append(f"{'warmer' if recipe.warmth > 0 else 'cooler'} {recipe.warmth:+d}")
    if recipe.sharpening:
        parts.append(f"sharpening {recipe.sharpening}")
    if recipe.look != "none":
        parts.append(f"{recipe.look} look")
    return ", ".join(parts)
