"""A visitor's choices between candidates: store them, fit the reward weights, and export them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from access.roles import Visitor
from recipes import encode_jpeg, shrink
from rewards import RewardFunction
from storage.preferences import JudgedCandidate, Preference, PreferenceStore
from training.preferences.export import to_choices, to_zip
from training.preferences.fit import FittedReward, fit_reward
from ui.files import new_file, writing
from ui.playground.samples import SAMPLES

SAMPLE_FILES = {name: sample.path for name, sample in SAMPLES.items()}
PHOTO_QUALITY = 90  # JPEG; a copy takes 30-90 kB


def save_choice(
    store: PreferenceStore,
    visitor: Visitor,
    pair: tuple[JudgedCandidate, JudgedCandidate],
    outcome: str,
    start: RewardFunction,
    sample: str = "",
    photo: np.ndarray | None = None,
) -> None:
    """Store a visitor's choice.

    Args:
        store: The database's choices.
        visitor: The visitor, who owns the choice.
        pair: The left and the right candidate.
        outcome: "left", "right" or "equal".
        start: The weights on the sliders.
        sample: File name of a bundled photo.
        photo: The photo, uint8 RGB, if its owner agrees that a small copy is kept. Ignored for bundled photos.

    Raises:
        StoreError: The choice cannot be stored.
    """
    jpeg = encode_jpeg(shrink(photo), PHOTO_QUALITY) if photo is not None and not sample else None
    store.add(Preference(pair[0], pair[1], outcome, start, sample, jpeg), visitor.id)


def fit_choices(preferences: Sequence[Preference], weights: RewardFunction) -> FittedReward:
    """Fit the reward to stored choices, starting from the sliders as they were at the first choice.

    The sliders as they are now would count the choices twice once the fitted weights have been applied to them.

    Args:
        preferences: The choices, oldest first.
        weights: The weights on the sliders now, which count if there is no choice yet.
    """
    return fit_reward(to_choices(preferences), preferences[0].start if preferences else weights)


def count_for_dpo(preferences: Sequence[Preference]) -> int:
    """Return how many choices of one side have a photo that is kept, or is a sample."""
    return sum(item.outcome != "equal" and (item.has_photo or item.sample in SAMPLE_FILES) for item in preferences)


def write_zip(preferences: Sequence[Preference]) -> str:
    """Write an export to a file for download and return its path. Raises gr.Error if the disk is full."""
    with writing():
        path = new_file("preferences.zip")
        path.write_bytes(to_zip(preferences, SAMPLE_FILES))
    return str(path)


def fit_json(fitted: FittedReward) -> dict[str, Any]:
    """Return a fit as a JSON object."""
    return {
        "choices": fitted.choices,
        "decided": fitted.decided,
        "agrees": fitted.agrees,
        "agrees_before": fitted.agrees_before,
        "weights": dict(fitted.function.weights),
        "start": dict(fitted.start.weights),
        "low": fitted.low,
        "high": fitted.high,
        "usable": fitted.usable,
        "message": fitted.message,
    }
