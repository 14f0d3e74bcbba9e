"""A reward function: the weights of the rewards, as a page, a file, a URL and a training run know it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

MAX_TEXT = 2_000


class RewardFunctionError(ValueError):
    """Weights that make no reward function; the message says why."""


@dataclass(frozen=True)
class RewardFunction:
    """Weights 0..1 by reward name, at least one above zero. Rewards that are not named weigh nothing.

    Raises RewardFunctionError for unknown names, for weights that are no numbers of 0..1, and when all are zero.
    """

    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", _checked(self.weights))

    def __hash__(self) -> int:
        return hash(tuple(self.weights.items()))

    @classmethod
    def from_json(cls, text: str | bytes | Mapping[str, float]) -> RewardFunction:
        """From `{"sharpness": 0.3, "creativity": 0.7}` as text or as a dict."""
        if isinstance(text, Mapping):
            return cls(text)
        if not isinstance(text, (str, bytes)) or len(text) > MAX_TEXT:
            raise RewardFunctionError(f"A reward function is a JSON object of at most {MAX_TEXT:,} characters.")
        try:
            return cls(json.loads(text, object_pairs_hook=_no_repeats))
        except RewardFunctionError:
            raise
        except (ValueError, RecursionError):
            raise RewardFunctionError('This is not JSON. A reward function looks like {"sharpness": 0.3}.') from None

    def to_json(self) -> str:
        """The whole reward function as JSON, in the order of REWARDS, weights of zero left out."""
        return json.dumps({name: weight for name, weight in self.weights.items() if weight})

    @classmethod
    def from_query(cls, text: str) -> RewardFunction:
        """From a URL's `sharpness:0.3,creativity:0.7`."""
        if not isinstance(text, str) or len(text) > MAX_TEXT:
            raise RewardFunctionError(f"A reward function in a link has at most {MAX_TEXT:,} characters.")
        parts = [part.partition(":") for part in text.split(",") if part.strip()]
        try:
            return cls(_no_repeats([(name.strip(), float(weight)) for name, _, weight in parts]))
        except RewardFunctionError:
            raise
        except ValueError:
            raise RewardFunctionError("This link's reward is not written like sharpness:0.3,creativity:0.7.") from None

    def to_query(self) -> str:
        """As in a URL: `sharpness:0.3,creativity:0.7`."""
        return ",".join(f"{name}:{_short(weight)}" for name, weight in self.weights.items() if weight)

    def total(self, scores: Mapping[str, float | None]) -> float | None:
        """The weighted mean of the scores that are not None and weigh something; None when there is none."""
        weighed = [(weight, scores.get(name)) for name, weight in self.weights.items() if weight > 0]
        known = [(weight, score) for weight, score in weighed if score is not None]
        if not known:
            return None
        return sum(weight * score for weight, score in known) / sum(weight for weight, _ in known)


def _short(weight: float) -> str:
    """The shortest text that reads back as the same number: 1, 0.3, 0.3515625."""
    text = f"{weight:g}"
    return text if float(text) == weight else repr(weight)


def _no_repeats(pairs: list[tuple[str, float]]) -> dict[str, float]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise RewardFunctionError("A reward is named twice.")
    return dict(pairs)


def _checked(weights: Mapping[str, float]) -> dict[str, float]:
    from rewards import REWARDS  # the table of rewards is built after this file

    if not isinstance(weights, Mapping):
        raise RewardFunctionError('A reward function is a JSON object such as {"sharpness": 0.3}.')
    unknown = [str(name)[:40] for name in weights if name not in REWARDS]
    if unknown:
        raise RewardFunctionError(f"There is no reward named {', '.join(unknown[:5])}; there are {', '.join(REWARDS)}.")
    ordered = {name: _weight(name, weights[name]) for name in REWARDS if name in weights}
    if not any(ordered.values()):
        raise RewardFunctionError("All weights are zero. Give at least one reward a weight above 0.")
    return ordered


def _weight(name: str, value: object) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value <= 1
    if not good:
        raise RewardFunctionError(f"The weight of {name} must be a number from 0 to 1, not {str(value)[:40]}.")
    return float(value)  # type: ignore[arg-type]
