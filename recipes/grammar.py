"""The recipe grammar: operations, their ranges and levels, and the canonical text that constrained decoding follows."""

from __future__ import annotations

import math
from dataclasses import dataclass

LOOKS = ("none", "mono", "sepia", "fade", "teal", "noir")


@dataclass(frozen=True)
class Slot:
    """One integer of an operation.

    Attributes:
        low: Smallest value.
        high: Largest value.
        step: Distance between the levels that a model may write.
        neutral: Value that leaves the picture unchanged.
        signed: Whether positive values are written with a plus sign.
    """

    low: int
    high: int
    step: int
    neutral: int
    signed: bool = False

    def format(self, value: int) -> str:
        """Format a value as canonical text: '+10', '0', '-10' if signed, else '10'."""
        return f"{value:+d}" if self.signed and value else str(value)

    def levels(self) -> list[int]:
        """Return the values that a model may write, in ascending order."""
        return list(range(self.low, self.high + 1, self.step))

    def clamp(self, value: float) -> int:
        """Round to the nearest integer in range; infinities become the limits. Raises ValueError for NaN."""
        if math.isnan(value):
            raise ValueError("not a number")
        return round(min(max(value, self.low), self.high))


@dataclass(frozen=True)
class Operation:
    """One operation of a recipe: either numbers (`slots`) or one of several words (`choices`).

    Attributes:
        name: Field name in `Recipe` and in the canonical text.
        slots: The operation's numbers, in order.
        choices: The allowed words.
        doc: Short description for prompts and documentation.
    """

    name: str
    slots: tuple[Slot, ...] = ()
    choices: tuple[str, ...] = ()
    doc: str = ""


_SIGNED = Slot(-100, 100, 10, 0, signed=True)
_START, _END = Slot(0, 40, 5, 0), Slot(60, 100, 5, 100)

# In the order of the canonical text. To add an operation: an entry here, a field of Recipe, a step in render.py.
OPERATIONS: dict[str, Operation] = {
    "crop": Operation("crop", (_START, _START, _END, _END), doc="left top right bottom, % of width and height"),
    "exposure": Operation("exposure", (_SIGNED,), doc="light; +100 is one and a half stops brighter"),
    "contrast": Operation("contrast", (_SIGNED,), doc="distance from middle grey; +100 doubles it"),
    "saturation": Operation("saturation", (_SIGNED,), doc="strength of the colours; +100 is 2.8 times"),
    "warmth": Operation("warmth", (_SIGNED,), doc="white balance; + is warmer, - is cooler"),
    "sharpening": Operation("sharpening", (Slot(0, 100, 10, 0),), doc="unsharp mask on luminance"),
    "look": Operation("look", choices=LOOKS, doc="a finished style on top"),
}


def grammar_segments() -> list[list[str]]:
    """Return the canonical text as a sequence of segments, each a list of alternatives.

    Joining one alternative per segment gives canonical text; `RecipeConstraint` is compiled from this.
    """
    segments: list[list[str]] = []
    for position, (name, operation) in enumerate(OPERATIONS.items()):
        segments.append([f"; {name}" if position else name])
        for slot in operation.slots:
            segments.append([f" {slot.format(level)}" for level in slot.levels()])
        if operation.choices:
            segments.append([f" {choice}" for choice in operation.choices])
    return segments
