"""Rewards: what a finished picture is worth. One file per reward; a reward is a function named in REWARDS."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from recipes import PREVIEW_SIDE, Recipe, crop_box, render_all, shrink
from rewards import image_metrics as compare
from rewards.colour import colour
from rewards.creativity import creativity
from rewards.function import RewardFunction, RewardFunctionError
from rewards.sharpness import sharpness

Reward = Callable[[np.ndarray, list[np.ndarray]], list[float | None]]

REWARDS: dict[str, Reward] = {"sharpness": sharpness, "colour": colour, "creativity": creativity}
DEFAULT = RewardFunction(dict.fromkeys(REWARDS, 1.0))

__all__ = [
    "DEFAULT",
    "REWARDS",
    "Reward",
    "RewardFunction",
    "RewardFunctionError",
    "Scored",
    "score",
    "score_recipes",
]


@dataclass(frozen=True)
class Scored:
    """A recipe with its preview (uint8 RGB), its scores by reward, and `fidelity`: mean CIEDE2000 to the source,
    cropped alike (0 is the same, 2.3 just noticeable)."""

    recipe: Recipe
    picture: np.ndarray
    scores: dict[str, float | None]
    fidelity: float


def score(
    source: np.ndarray, candidates: list[np.ndarray], names: Collection[str] = tuple(REWARDS)
) -> list[dict[str, float | None]]:
    """The named rewards of every candidate: uint8 RGB pictures of one group, made by one model from one source photo.

    A reward's values do not depend on which others are asked for.
    """
    columns = {name: reward(source, candidates) for name, reward in REWARDS.items() if name in names}
    return [{name: values[index] for name, values in columns.items()} for index in range(len(candidates))]


def score_recipes(photo: np.ndarray, recipes: list[Recipe], names: Collection[str] = tuple(REWARDS)) -> list[Scored]:
    """The one function behind the scores on screen, in the API and in training: shrinks the photo (uint8 RGB) to the
    preview size, renders each recipe and scores the results as one group. A recipe that repeats is rendered once."""
    source = shrink(photo, PREVIEW_SIDE)
    different = list(dict.fromkeys(recipes))
    rendered = dict(zip(different, render_all(source, different), strict=True))
    pictures = [rendered[recipe] for recipe in recipes]
    return [
        Scored(recipe, picture, scores, _fidelity(source, recipe, picture))
        for recipe, picture, scores in zip(recipes, pictures, score(source, pictures, names), strict=True)
    ]


def _fidelity(source: np.ndarray, recipe: Recipe, picture: np.ndarray) -> float:
    left, top, right, bottom = crop_box(source, recipe)
    return compare.fidelity(source[top:bottom, left:right], picture)
