"""The renderer: identity, the effect of each operation, crops, inverses, extreme values."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recipes import LOOKS, Recipe, crop_box, random_recipe, render, render_all, shrink

# No deadline: these properties must hold on a loaded machine too.
NO_DEADLINE = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """Synthesize a scene, 120 x 160: smooth colours with edges and some texture."""
    y, x = np.mgrid[0:120, 0:160] / 160
    scene = np.stack([0.2 + 0.6 * x, 0.3 + 0.4 * y, 0.6 - 0.4 * x * y], axis=-1)
    scene[30:70, 40:90] = (0.7, 0.4, 0.3)
    scene += np.random.default_rng(0).normal(0, 0.02, scene.shape)
    return (np.clip(scene, 0, 1) * 255).astype(np.uint8)


def luminance(picture: np.ndarray) -> np.ndarray:
    return picture @ np.array([0.2126, 0.7152, 0.0722])


def chroma(picture: np.ndarray) -> float:
    lab = cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    return float(np.hypot(lab[..., 1], lab[..., 2]).mean())


def test_the_identity_leaves_every_pixel(photo: np.ndarray) -> None:
    assert np.array_equal(render(photo, Recipe()), photo)


def test_a_nearly_neutral_recipe_is_exact_to_one_level() -> None:
    """Lookup tables and rounding move no grey value by more than one."""
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2).repeat(4, axis=1)
    assert np.abs(render(ramp, Recipe(saturation=40)).astype(int) - ramp).max() <= 1  # grey has no saturation
    assert np.abs(render(ramp, Recipe(look="mono")).astype(int) - ramp).max() <= 1


def test_a_crop_copies_pixels(photo: np.ndarray) -> None:
    recipe = Recipe(crop=(10, 20, 90, 60))
    left, top, right, bottom = crop_box(photo, recipe)
    assert (left, top, right, bottom) == (16, 24, 144, 72)
    assert np.array_equal(render(photo, recipe), photo[24:72, 16:144])


@NO_DEADLINE
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 40), st.integers(60, 100))
def test_a_crop_is_never_empty(height: int, width: int, low: int, high: int) -> None:
    picture = render(np.zeros((height, width, 3), np.uint8), Recipe(crop=(low, low, high, high), contrast=10))
    assert picture.shape[0] >= 1 and picture.shape[1] >= 1


@pytest.mark.parametrize("level", [10, 50, 100])
def test_exposure_is_a_gain_in_linear_light(photo: np.ndarray, level: int) -> None:
    dark = (photo * 0.3).astype(np.uint8)
    linear = [np.where((v := p / 255) <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4) for p in
              (dark, render(dark, Recipe(exposure=level)))]  # fmt: skip
    bright_enough = linear[0] > 0.02
    ratio = (linear[1] / np.maximum(linear[0], 1e-9))[bright_enough]
    assert abs(np.median(ratio) / 2 ** (1.5 * level / 100) - 1) < 0.02


@pytest.mark.parametrize("name", ["exposure", "contrast", "saturation", "warmth"])
def test_a_negated_level_inverts_the_operation(photo: np.ndarray, name: str) -> None:
    soft = (64 + photo / 2).astype(np.uint8)  # mid-tones, so that nothing is clipped
    edited = render(soft, Recipe(**{name: -20}))
    restored = render(edited, Recipe(**{name: 20}))
    assert np.abs(edited.astype(int) - soft).mean() > 1
    assert np.abs(restored.astype(int) - soft).max() <= 4


def test_positive_levels_brighten_saturate_and_warm(photo: np.ndarray) -> None:
    assert luminance(render(photo, Recipe(exposure=30))).mean() > luminance(photo).mean() + 5
    assert luminance(render(photo, Recipe(contrast=40))).std() > luminance(photo).std() * 1.2
    assert chroma(render(photo, Recipe(saturation=40))) > chroma(photo) * 1.2
    warm = render(photo, Recipe(warmth=60)).astype(int) - photo
    assert warm[..., 0].mean() > 3 and warm[..., 2].mean() < -3


def test_warmth_keeps_the_luminance_of_grey() -> None:
    grey = np.full((8, 8, 3), 128, np.uint8)
    for level in (-100, -40, 40, 100):
        coded = render(grey, Recipe(warmth=level)) / 255
        linear = ((coded + 0.055) / 1.055) ** 2.4
        assert abs(float(luminance(linear).mean()) - ((128 / 255 + 0.055) / 1.055) ** 2.4) < 0.003


def test_sharpening_raises_detail_and_keeps_colour(photo: np.ndarray) -> None:
    sharp = render(photo, Recipe(sharpening=80))
    assert cv2.Laplacian(luminance(sharp), cv2.CV_64F).std() > 1.3 * cv2.Laplacian(luminance(photo), cv2.CV_64F).std()
    moved = sharp.astype(int) - photo
    assert np.abs(moved[..., 0] - moved[..., 1]).max() <= 2


def test_a_preview_matches_the_full_size_rendering(photo: np.ndarray) -> None:
    large = cv2.resize(photo, (1600, 1200), interpolation=cv2.INTER_CUBIC)
    recipe = Recipe((5, 0, 95, 90), exposure=20, contrast=10, sharpening=60, look="fade")
    preview, full = render(shrink(large, 512), recipe), render(large, recipe)
    reduced = cv2.resize(full, preview.shape[1::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(reduced.astype(int) - preview).mean() < 2


def test_looks_differ_and_mono_is_grey(photo: np.ndarray) -> None:
    pictures = [render(photo, Recipe(look=look)) for look in LOOKS]
    for first, second in itertools.combinations(pictures, 2):
        assert np.abs(first.astype(int) - second).mean() > 2
    for look in ("mono", "noir"):
        picture = pictures[LOOKS.index(look)]
        assert np.array_equal(picture[..., 0], picture[..., 2])


@NO_DEADLINE
@given(st.integers(0, 2**32 - 1), st.tuples(st.integers(1, 50), st.integers(1, 50)))
def test_any_recipe_on_any_size_renders(seed: int, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    picture = render(rng.integers(0, 256, (*size, 3), dtype=np.uint8), random_recipe(rng, change_probability=1))
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3 and picture.size > 0


def test_render_all_equals_single_renders(photo: np.ndarray) -> None:
    rng = np.random.default_rng(3)
    recipes = [random_recipe(rng) for _ in range(9)] + [Recipe()]
    for recipe, picture in zip(recipes, render_all(photo, recipes)):
        assert np.array_equal(picture, render(photo, recipe))
    assert render_all(photo, []) == []


def test_shrink_never_enlarges(photo: np.ndarray) -> None:
    assert shrink(photo, 512) is photo
    assert shrink(photo, 80).shape == (60, 80, 3)
    assert shrink(np.zeros((1000, 2, 3), np.uint8), 100).shape == (100, 1, 3)
