"""The rewards must need the photo: the report's figures over a part of the bundled photos, and its arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from recipes import Recipe, load_photo
from rewards.report import COLUMNS, PHOTOS, at_limit, draw, measure, report, summarise, table

EVERY, RECIPES = 12, 96  # of the bundled photos, of the 256 recipes of the full report


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, float]]:
    files = sorted(PHOTOS.glob("*.jpg"))[::EVERY]
    recipes = draw(RECIPES)
    return summarise(np.stack([measure(load_photo(file), recipes) for file in files]), recipes)


def test_one_recipe_for_all_is_not_enough(rows: dict[str, dict[str, float]]) -> None:
    assert list(rows) == ["sharpness", "colour", "creativity", "equal weights"]
    for name, row in rows.items():
        assert row["best_per_photo"] > row["untouched"] + 0.1, (name, row)
        assert row["blind_share"] <= 0.85, (name, row)


def test_the_best_recipe_is_seldom_at_a_limit(rows: dict[str, dict[str, float]]) -> None:
    for name, row in rows.items():
        assert row["at_limits"] <= 0.2, (name, row)


def test_a_specialist_loses_elsewhere() -> None:
    """The best recipes for one reward are worse than the other rewards' own best ones: the sliders really steer."""
    recipes = draw(RECIPES)
    scores = np.stack([measure(load_photo(file), recipes) for file in sorted(PHOTOS.glob("*.jpg"))[::28]])
    winners = scores.argmax(axis=1)  # [photos, rewards]
    photos = np.arange(len(scores))
    for wanted in range(3):
        own = scores[photos, winners[:, wanted], wanted].mean()
        others = [scores[photos, winners[:, reward], wanted].mean() for reward in range(3) if reward != wanted]
        assert own > max(others) + 0.05


def test_the_arithmetic() -> None:
    recipes = [Recipe(exposure=10), Recipe(exposure=100), Recipe(warmth=20)]
    scores = np.zeros((2, 4, 3))
    scores[:, :, 0] = [[0.2, 0.6, 0.8, 0.1], [0.2, 0.6, 0.2, 0.9]]
    row = summarise(scores, recipes)["sharpness"]
    assert row["untouched"] == pytest.approx(0.2) and row["best_single"] == pytest.approx(0.6)
    assert row["best_per_photo"] == pytest.approx(0.85) and row["blind_share"] == pytest.approx(0.4 / 0.65)
    assert row["at_limits"] == 0.5 and row["best_single_recipe"] == str(recipes[0])


def test_a_score_that_does_not_apply_is_left_out() -> None:
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
def test_limits(recipe: Recipe, limit: bool) -> None:
    assert at_limit(recipe) is limit


def test_files_are_read_and_the_table_is_written() -> None:
    rows = report(sorted(PHOTOS.glob("*.jpg"))[:2], draw(3), processes=1)
    lines = table(rows).splitlines()
    assert len(lines) == 2 + len(rows) and all(line.count("|") == len(COLUMNS) + 2 for line in lines)
