"""Score recipes: the one call behind the scores on the page, in the API and in training."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from recipes import PREVIEW_SIDE, Recipe, crop_box, render_all, shrink
from rewards import image_metrics

# Called with the source and the candidates of one group (uint8 [H, W, 3] RGB). Returns one score 0..1 per candidate,
# None where the reward does not apply.
Reward = Callable[[np.ndarray, list[np.ndarray]], list[float | None]]


@dataclass(frozen=True)
class ScoredRecipe:
    """A recipe with its rendered preview and its scores.

    Attributes:
        recipe: The recipe.
        picture: The rendered preview, uint8 RGB.
        scores: Score by reward name.
        fidelity: Mean CIEDE2000 to the source with the same crop; 0 is identical, 2.3 just noticeable.
    """

    recipe: Recipe
    picture: np.ndarray
    scores: dict[str, float | None]
    fidelity: float


def score_pictures(
    source: np.ndarray, candidates: list[np.ndarray], names: Collection[str] | None = None
) -> list[dict[str, float | None]]:
    """Score pictures with several rewards. A reward's values do not depend on the other names.

    Args:
        source: The photo, uint8 [H, W, 3] RGB.
        candidates: Pictures of one group, uint8 RGB, made by one model from `source`.
        names: Rewards to compute; all of REWARDS by default.

    Returns:
        One dict of scores by reward name per candidate.
    """
    from rewards import REWARDS  # the table is built after this module is imported

    columns = {name: reward(source, candidates) for name, reward in REWARDS.items() if names is None or name in names}
    return [{name: values[index] for name, values in columns.items()} for index in range(len(candidates))]


def score_recipes(photo: np.ndarray, recipes: list[Recipe], names: Collection[str] | None = None) -> list[ScoredRecipe]:
    """Render recipes on a photo at preview size and score the pictures as one group.

    Args:
        photo: uint8 [H, W, 3] RGB of any size.
        recipes: The group's recipes. A repeated recipe is rendered once.
        names: Rewards to compute; all of REWARDS by default.
    """
    source = shrink(photo, PREVIEW_SIDE)
    unique = list(dict.fromkeys(recipes))
    rendered = dict(zip(unique, render_all(source, unique), strict=True))
    pictures = [rendered[recipe] for recipe in recipes]
    return [
        ScoredRecipe(recipe, picture, scores, _fidelity(source, recipe, picture))
        for recipe, picture, scores in zip(recipes, pictures, score_pictures(source, pictures, names), strict=True)
    ]


def _fidelity(source: np.ndarray, recipe: Recipe, picture: np.ndarray) -> float:
    left, top, right, bottom = crop_box(source, recipe)
    return image_metrics.fidelity(source[top:bottom, left:right], picture)
