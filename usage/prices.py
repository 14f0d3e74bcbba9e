"""Prices: one dated table with its sources, which a file may override. What is not in it has no known price."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

AS_OF = "2026-10-07"
SOURCES = {
    "models": "https://moondream.ai/pricing",
    "training": "https://moondream.ai/pricing",
    "hardware": "https://huggingface.co/docs/hub/spaces-overview and /docs/hub/jobs-pricing",
}
MILLION = 1_000_000
MAX_FILE = 2**20


class PriceError(ValueError):
    """A file of prices that cannot be used; the message says what to change."""


@dataclass(frozen=True)
class Tokens:
    """US dollars per million tokens."""

    input: float
    output: float


# Only what a source states. A Space's GPUs are not here: no source with a date was at hand; a file may add them.
# A tuned model ("moondream3-preview/<id>@<step>") costs what its base does: no other price is published (assumption).
MODELS = {
    "moondream3.1-9B-A2B": Tokens(0.30, 1.00),
    "moondream3-preview": Tokens(0.30, 2.50),
    "batch/moondream3.1-9B-A2B": Tokens(0.15, 0.50),
    "batch/moondream3-preview": Tokens(0.15, 1.25),
}
TRAINING = {"moondream3-preview": 0.60}  # US dollars per million training tokens
HARDWARE = {"cpu-basic": 0.0, "cpu-upgrade": 0.03, "job/cpu-basic": 0.01}  # US dollars per hour, counted by the second


@dataclass(frozen=True)
class Prices:
    """What calls cost, in US dollars; None where the price is not known."""

    models: Mapping[str, Tokens] = field(default_factory=lambda: MODELS)
    training: Mapping[str, float] = field(default_factory=lambda: TRAINING)
    hardware: Mapping[str, float] = field(default_factory=lambda: HARDWARE)
    as_of: str = AS_OF

    @classmethod
    def read(cls, file: Path) -> Prices:
        """The table with a JSON file's entries put over it. Raises PriceError.

        {"as_of": "2027-01-31", "models": {name: {"input": 0.3, "output": 1.0}}, "training": {name: 0.6},
        "hardware": {name: 0.4}}
        """
        try:
            if file.stat().st_size > MAX_FILE:
                raise PriceError(f"{file.name} is too large for a file of prices.")
            given = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PriceError(f"{file.name} cannot be read as JSON ({type(error).__name__}).") from None
        if not isinstance(given, dict) or set(given) - {"as_of", "models", "training", "hardware"}:
            raise PriceError(f"{file.name} may have as_of, models, training and hardware, and nothing else.")
        models = {
            name: Tokens(
                *(_price(name, each.get(way) if isinstance(each, dict) else None) for way in ("input", "output"))
            )
            for name, each in _table(given, "models").items()
        }
        training, hardware = (
            {name: _price(name, each) for name, each in _table(given, part).items()}
            for part in ("training", "hardware")
        )
        as_of = str(given.get("as_of", f"{AS_OF}, changed by {file.name}"))
        return cls({**MODELS, **models}, {**TRAINING, **training}, {**HARDWARE, **hardware}, as_of)

    def call(self, model: str, tokens_in: int | None, tokens_out: int | None) -> float | None:
        """A call of a hosted model. A tuned model's name ends in /<id>@<step>."""
        price = self.models.get(model) or self.models.get(model.partition("/")[0])
        if price is None or tokens_in is None or tokens_out is None:
            return None
        return (tokens_in * price.input + tokens_out * price.output) / MILLION

    def train(self, model: str, tokens: int | None) -> float | None:
        """A training step of a hosted model over so many tokens."""
        price = self.training.get(model)
        return None if price is None or tokens is None else tokens * price / MILLION

    def machine(self, hardware: str | None, seconds: float) -> float | None:
        """So many seconds of a machine; `hardware`: its name at Hugging Face, None where it is not known."""
        price = self.hardware.get(hardware) if hardware else None
        return None if price is None else seconds * price / 3600


def _table(given: dict[str, Any], part: str) -> dict[str, Any]:
    table = given.get(part, {})
    if not isinstance(table, dict):
        raise PriceError(f"{part} must be an object with a price for each name.")
    return table


def _price(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise PriceError(f"The price of {name[:80]!r} must be a number, 0 or more.")
    return float(value)
