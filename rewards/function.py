"""RewardFunction: the weights of the rewards, as used by the page, saved files, links and training runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

MAX_TEXT = 2_000  # characters


class RewardFunctionError(ValueError):
    """Raised for invalid weights. The message says what is wrong."""


@dataclass(frozen=True)
class RewardFunction:
    """A weighted mean of rewards.

    Attributes:
        weights: Weight 0..1 by reward name, in the order of REWARDS, at least one above zero. Missing rewards have
            weight zero.

    Raises:
        RewardFunctionError: For an unknown reward, a weight that is not a number from 0 to 1, or only zeros.
    """

    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", _validate(self.weights))

    def __hash__(self) -> int:
        return hash(tuple(self.weights.items()))

    @classmethod
    def from_json(cls, source: str | bytes | Mapping[str, float]) -> RewardFunction:
        """Create a reward function from `{"sharpness": 0.3, "creativity": 0.7}` as JSON text or as a mapping."""
        if isinstance(source, Mapping):
            return cls(source)
        if not isinstance(source, (str, bytes)) or len(source) > MAX_TEXT:
            raise RewardFunctionError(f"A reward function is a JSON object of at most {MAX_TEXT:,} characters.")
        try:
            return cls(json.loads(source, object_pairs_hook=_unique_names))
        except RewardFunctionError:
            raise
        except (ValueError, RecursionError):
            raise RewardFunctionError('This is not JSON. Write a reward function like {"sharpness": 0.3}.') from None

    def to_json(self) -> str:
        """Return the weights as JSON, in the order of REWARDS, without zeros."""
        return json.dumps({name: weight for name, weight in self.weights.items() if weight})

    @classmethod
    def from_query(cls, text: str) -> RewardFunction:
        """Create a reward function from a link's `sharpness:0.3,creativity:0.7`."""
        if not isinstance(text, str) or len(text) > MAX_TEXT:
            raise RewardFunctionError(f"A reward function in a link has at most {MAX_TEXT:,} characters.")
        parts = [part.partition(":") for part in text.split(",") if part.strip()]
        try:
            return cls(_unique_names([(name.strip(), float(weight)) for name, _, weight in parts]))
        except RewardFunctionError:
            raise
        except ValueError:
            raise RewardFunctionError(
                "The reward in this link is invalid. Write it like sharpness:0.3,creativity:0.7."
            ) from None

    def total(self, scores: Mapping[str, float | None]) -> float | None:
        """Return the weighted mean of the scores, ignoring None; None if no weighted reward has a score."""
        weighted = [(weight, scores.get(name)) for name, weight in self.weights.items() if weight > 0]
        available = [(weight, score) for weight, score in weighted if score is not None]
        if not available:
            return None
        return sum(weight * score for weight, score in available) / sum(weight for weight, _ in available)


def _unique_names(pairs: list[tuple[str, float]]) -> dict[str, float]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise RewardFunctionError("A reward is named twice.")
    return dict(pairs)


def _validate(weights: Mapping[str, float]) -> dict[str, float]:
    """Return the weights in the order of REWARDS."""
    from rewards import REWARDS  # the table is built after this module is imported

    if not isinstance(weights, Mapping):
        raise RewardFunctionError('A reward function is a JSON object such as {"sharpness": 0.3}.')
    unknown = [str(name)[:40] for name in weights if name not in REWARDS]
    if unknown:
        raise RewardFunctionError(
            f"There is no reward named {', '.join(unknown[:5])}. Choose from {', '.join(REWARDS)}."
        )
    ordered = {name: _validate_weight(name, weights[name]) for name in REWARDS if name in weights}
    if not any(ordered.values()):
        raise RewardFunctionError("All weights are zero. Give at least one reward a weight above 0.")
    return ordered


def _validate_weight(name: str, value: object) -> float:
    if (
        not isinstance(value, (int, float))
        or isinstance(value, bool)
        or not math.isfinite(value)
        or not 0 <= value <= 1
    ):
        raise RewardFunctionError(f"The weight of {name} must be a number from 0 to 1, not {str(value)[:40]}.")
    return float(value)
