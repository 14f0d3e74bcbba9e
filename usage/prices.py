"""Prices of model calls, training and hardware: a dated table with sources, which a JSON file can override."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

AS_OF = "2026-10-07"
SOURCES = {
    "models": "https://moondream.ai/pricing",
    "training": "https://moondream.ai/pricing",
    "hardware": "https://huggingface.co/docs/hub/spaces-overview and /docs/hub/jobs-pricing",
}
MILLION = 1_000_000
MAX_FILE_SIZE = 2**20  # bytes

Price = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]


class PriceError(ValueError):
    """Raised for an invalid file of prices. The message says what to change."""


class TokenPrice(BaseModel):
    """Prices of a model in US dollars per million tokens."""

    model_config = ConfigDict(frozen=True)

    input: Price
    output: Price


class _PriceFile(BaseModel):
    """Content of PRICES_FILE."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    as_of: str | None = None
    models: dict[str, TokenPrice] = {}
    training: dict[str, Price] = {}
    hardware: dict[str, Price] = {}


# Only published prices. GPUs of Spaces are missing because no dated source was available; a file can add them.
# Tuned models ("moondream3-preview/<id>@<step>") are assumed to cost as much as their base model.
MODELS = {
    "moondream3.1-9B-A2B": TokenPrice(input=0.30, output=1.00),
    "moondream3-preview": TokenPrice(input=0.30, output=2.50),
    "batch/moondream3.1-9B-A2B": TokenPrice(input=0.15, output=0.50),
    "batch/moondream3-preview": TokenPrice(input=0.15, output=1.25),
}
TRAINING = {"moondream3-preview": 0.60}  # US dollars per million training tokens
HARDWARE = {"cpu-basic": 0.0, "cpu-upgrade": 0.03, "job/cpu-basic": 0.01}  # US dollars per hour, billed by the second


@dataclass(frozen=True)
class Prices:
    """A table of prices in US dollars. Its methods return None if the price is not known.

    Attributes:
        models: Token prices by model.
        training: Price per million training tokens by model.
        hardware: Price per hour by the hardware's name at Hugging Face.
        as_of: Date of the table.
    """

    models: Mapping[str, TokenPrice] = field(default_factory=lambda: MODELS)
    training: Mapping[str, float] = field(default_factory=lambda: TRAINING)
    hardware: Mapping[str, float] = field(default_factory=lambda: HARDWARE)
    as_of: str = AS_OF

    @classmethod
    def read(cls, file: Path) -> Prices:
        """Read a JSON file whose entries override the built-in table.

        Example: {"as_of": "2027-01-31", "models": {"m": {"input": 0.3, "output": 1.0}}, "training": {"m": 0.6},
        "hardware": {"t4-small": 0.4}}

        Raises:
            PriceError: The file cannot be read or is invalid.
        """
        try:
            if file.stat().st_size > MAX_FILE_SIZE:
                raise PriceError(f"{file.name} is too large. A file of prices may have {MAX_FILE_SIZE // 2**20} MB.")
            content = _PriceFile.model_validate_json(file.read_bytes())
        except OSError as error:
            raise PriceError(f"{file.name} cannot be read ({error.strerror}).") from None
        except ValidationError as error:
            problem = error.errors()[0]
            location = ".".join(str(part)[:80] for part in problem["loc"])
            raise PriceError(f"{file.name}: {location}: {problem['msg']}".replace(": : ", ": ")) from None
        return cls(
            {**MODELS, **content.models},
            {**TRAINING, **content.training},
            {**HARDWARE, **content.hardware},
            content.as_of or f"{AS_OF}, changed by {file.name}",
        )

    def call(self, model: str, tokens_in: int | None, tokens_out: int | None) -> float | None:
        """Return the cost of a hosted model call. Names of tuned models end in /<id>@<step>."""
        price = self.models.get(model) or self.models.get(model.partition("/")[0])
        if price is None or tokens_in is None or tokens_out is None:
            return None
        return (tokens_in * price.input + tokens_out * price.output) / MILLION

    def train(self, model: str, tokens: int | None) -> float | None:
        """Return the cost of training a hosted model on `tokens` tokens."""
        price = self.training.get(model)
        return None if price is None or tokens is None else tokens * price / MILLION

    def machine(self, hardware: str | None, seconds: float) -> float | None:
        """Return the cost of `seconds` seconds of hardware, given by its name at Hugging Face."""
        price = self.hardware.get(hardware) if hardware else None
        return None if price is None else seconds * price / 3600
