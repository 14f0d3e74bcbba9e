"""The report on how far the rewards depend on the photo: figures on bundled photos, and its arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from recipes import Recipe, load_photo, render, shrink
from rewards.report import COLUMNS, PHOTOS, at_limit, markdown_table, random_recipes, report, score_photo, summarise

pytestmark = pytest.mark.slow

PHOTO_STEP, RECIPES = 12, 96  # every 12th bundled photo; the full report draws 256 recipes


FLAWS = (
    Recipe(exposure=-70, contrast=-30),
    Recipe(contrast=-60, saturation=-40),
    Recipe(warmth=70, exposure=40),
    Recipe(saturation=-80),
)


def photos(step: int) -> list[np.ndarray]:
    """Return every n-th bundled photo, each followed by a flawed version."""
    loaded = [shrink(load_photo(file)) for file in sorted(PHOTOS.glob("*.jpg"))[::step]]
    flawed = [render(photo, FLAWS[index % len(FLAWS)]) for index, photo in enumerate(loaded)]
    return [version for pair in zip(loaded, flawed, strict=True) for version in pair]


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, float]]:
    recipes = random_recipes(RECIPES)
    return summarise(np.stack([score_photo(photo, recipes) for photo in photos(PHOTO_STEP)]), recipes)


def test_a_single_recipe_does_not_suffice(rows: dict[str, dict[str, float]]) -> None:
    assert list(rows) == ["sharpness", "colour", "creativity", "equal weights"]
    for name, row in rows.items():
        assert row["best_per_photo"] > row["untouched"] + 0.1, (name, row)
        assert row["blind_share"] <= 0.7, (name, row)


def test_best_recipes_are_rarely_at_a_limit(rows: dict[str, dict[str, float]]) -> None:
    for name, row in rows.items():
        assert row["at_limits"] <= 0.35, (name, row)  # half of the photos are flawed, some strongly


def test_rewards_prefer_different_recipes() -> None:
    """The best recipes for one reward score lower on the other rewards than those rewards' own best recipes."""
    recipes = random_recipes(RECIPES)
    scores = np.stack([score_photo(photo, recipes) for photo in photos(14)])
    winners = scores.argmax(axis=1)  # [photos, rewards]
    every = np.arange(len(scores))
    for reward in range(3):
        own = scores[every, winners[:, reward], reward].mean()
        others = [scores[every, winners[:, other], reward].mean() for other in range(3) if other != reward]
        assert own > max(others) + 0.005


def test_summarise_computes_gains_and_shares() -> None:
    recipes = [Recipe(exposure=10), Recipe(exposure=100), Recipe(warmth=20)]
    scores = np.zeros((2, 4, 3))
    scores[:, :, 0] = [[0.2, 0.6, 0.8, 0.1], [0.2, 0.6, 0.2, 0.9]]
    row = summarise(scores, recipes)["sharpness"]
    assert row["untouched"] == pytest.approx(0.2) and row["best_single"] == pytest.approx(0.6)
    assert row["best_per_photo"] == pytest.approx(0.85) and row["blind_share"] == pytest.approx(0.4 / 0.65)
    assert row["at_limits"] == 0.5 and row["best_single_recipe"] == str(recipes[0])


def test_missing_scores_are_ignored() -> None:
    scores = np.full((1, 2, 3), 0.5)
    scores[0, 1] = [0.8, np.nan, 0.6]
    assert summarise(scores, [Recipe()])["equal weights"]["best_per_photo"] == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("recipe", "limit"),
    [
        (Recipe(), False),
        (Recipe(exposure=-100), True),
        (Recipe(sharpening=100), True),
        (Recipe(sharpening=0, exposure=90), False),
        (Recipe(crop=(40, 0, 60, 100)), True),
        (Recipe(crop=(40, 40, 65, 100)), False),
    ],
)
def test_at_limit(recipe: Recipe, limit: bool) -> None:
    assert at_limit(recipe) is limit


def test_report_reads_files_and_formats_a_table() -> None:
    rows = report(sorted(PHOTOS.glob("*.jpg"))[:2], random_recipes(3), processes=1)
    lines = markdown_table(rows).splitlines()
    assert len(lines) == 2 + len(rows) and all(line.count("|") == len(COLUMNS) + 2 for line in lines)
