"""Degradation: the inverse recipe restores the photo."""

import numpy as np
import pytest

from recipes import Recipe, load_photo, render, shrink
from training.data.bundled import bundled_photos
from training.pretrain.degradation import (
    add_border,
    degrade,
    lab_error,
    random_degradation,
    random_inverse_recipe,
    slight_degradation,
)


def held_out_photos(count: int = 8) -> list[np.ndarray]:
    return [shrink(load_photo(info.path), 320) for info in bundled_photos("held-out")[:count]]


def test_the_inverse_recipe_removes_most_of_the_error() -> None:
    before, after = [], []
    for index, photo in enumerate(held_out_photos()):
        for copy in range(4):
            example = random_degradation(photo, np.random.default_rng([index, copy]), probability=1.0)
            before.append(lab_error(example.degraded, photo))
            after.append(lab_error(render(example.degraded, example.inverse_recipe), photo))
    assert np.mean(after) < 0.3 * np.mean(before)


@pytest.mark.parametrize("name", ["exposure", "contrast", "saturation", "warmth"])
@pytest.mark.parametrize(("level", "remaining"), [(-50, 0.75), (50, 0.45)])
def test_each_operation_is_inverted_by_its_negation(name: str, level: int, remaining: float) -> None:
    """At most a share `remaining` of the error is left. Inverting -50 brightens the photo, which clips highlights."""
    rng = np.random.default_rng(0)
    for photo in held_out_photos(4):
        inverse_recipe = Recipe(**{name: level})
        degraded = degrade(photo, inverse_recipe, rng)
        assert lab_error(render(degraded, inverse_recipe), photo) < remaining * lab_error(degraded, photo)


@pytest.mark.parametrize("seed", range(5))
def test_the_crop_removes_the_border(seed: int) -> None:
    photo = held_out_photos(1)[0]
    crop = (10, 5, 90, 100)
    bordered = add_border(photo, crop, np.random.default_rng(seed))
    assert bordered.shape[1] / photo.shape[1] == pytest.approx(1.25, abs=0.02)
    assert lab_error(render(bordered, Recipe(crop=crop)), photo) < 0.35 * lab_error(bordered, photo)


def test_random_inverse_recipes_are_in_range_and_seeded() -> None:
    recipes = [random_inverse_recipe(np.random.default_rng(seed)) for seed in range(200)]
    assert recipes == [random_inverse_recipe(np.random.default_rng(seed)) for seed in range(200)]
    assert len(set(map(str, recipes))) > 150
    assert all(r.exposure % 10 == 0 and r.crop[0] <= 25 and r.crop[3] >= 75 for r in recipes)
    assert sum(abs(r.exposure) <= 50 for r in recipes) > sum(abs(r.exposure) > 50 for r in recipes)
    assert sum(abs(r.exposure) == 100 for r in recipes) < 20, "levels out of range are drawn again, not clamped"


def test_lab_error_is_zero_for_the_same_picture() -> None:
    photo = held_out_photos(1)[0]
    assert lab_error(photo, photo) == 0
    assert lab_error(render(photo, Recipe(exposure=50)), photo) > 5


def test_a_slight_degradation_keeps_the_frame_and_half_of_the_photos() -> None:
    photo = held_out_photos(1)[0]
    examples = [slight_degradation(photo, np.random.default_rng(seed)) for seed in range(40)]
    errors = [lab_error(e.degraded, photo) for e in examples]
    assert 10 <= sum(e.inverse_recipe == Recipe() for e in examples) <= 30
    assert all(e.inverse_recipe.crop == Recipe().crop for e in examples)
    assert 0 < np.mean(errors) < 6
