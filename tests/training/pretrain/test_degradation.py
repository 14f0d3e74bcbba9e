"""Degrading and undoing: the recipe that is asked for really restores the photo."""

import numpy as np
import pytest

from recipes import Recipe, load_photo, render, shrink
from training.data.bundled import bundled_photos
from training.pretrain.degradation import degrade, error, frame, random_undo, spoil


def photos(count: int = 8) -> list[np.ndarray]:
    return [shrink(load_photo(info.path), 320) for info in bundled_photos("held-out")[:count]]


def test_the_known_recipe_undoes_most_of_the_damage() -> None:
    before, after = [], []
    for index, photo in enumerate(photos()):
        for copy in range(4):
            example = spoil(photo, np.random.default_rng([index, copy]), share=1.0)
            before.append(error(example.spoilt, photo))
            after.append(error(render(example.spoilt, example.recipe), photo))
    assert np.mean(after) < 0.3 * np.mean(before)


@pytest.mark.parametrize("name", ["exposure", "contrast", "saturation", "warmth"])
@pytest.mark.parametrize(("level", "left"), [(-50, 0.75), (50, 0.45)])
def test_each_operation_is_undone_by_its_negation(name: str, level: int, left: float) -> None:
    """At most a share `left` of the error stays; undoing -50 means light that was clipped, and clipped is lost."""
    rng = np.random.default_rng(0)
    for photo in photos(4):
        undo = Recipe(**{name: level})
        spoilt = degrade(photo, undo, rng)
        assert error(render(spoilt, undo), photo) < left * error(spoilt, photo)


@pytest.mark.parametrize("seed", range(5))
def test_a_crop_finds_the_photo_in_its_frame(seed: int) -> None:
    photo = photos(1)[0]
    crop = (10, 5, 90, 100)
    framed = frame(photo, crop, np.random.default_rng(seed))
    assert framed.shape[1] / photo.shape[1] == pytest.approx(1.25, abs=0.02)
    assert error(render(framed, Recipe(crop=crop)), photo) < 0.35 * error(framed, photo)


def test_random_undo_is_in_range_and_repeatable() -> None:
    recipes = [random_undo(np.random.default_rng(seed)) for seed in range(200)]
    assert recipes == [random_undo(np.random.default_rng(seed)) for seed in range(200)]
    assert len(set(map(str, recipes))) > 150
    assert all(r.exposure % 10 == 0 and r.crop[0] <= 25 and r.crop[3] >= 75 for r in recipes)
    assert sum(abs(r.exposure) <= 50 for r in recipes) > sum(abs(r.exposure) > 50 for r in recipes)
    assert sum(abs(r.exposure) == 100 for r in recipes) < 20, "what goes too far is drawn again, not held at the end"


def test_error_is_zero_for_the_same_picture_and_symmetric_in_size() -> None:
    photo = photos(1)[0]
    assert error(photo, photo) == 0
    assert error(render(photo, Recipe(exposure=50)), photo) > 5
