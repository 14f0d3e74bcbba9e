"""The contract of every reward, and the properties of each of the three, on synthetic and bundled photos."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from recipes import Recipe, load_photo, random_recipe, render, shrink
from rewards import REWARDS, comparison, image_metrics, score_pictures, score_recipes
from rewards.creativity import novelty
from rewards.focus import detail, noise
from rewards.measures import measure
from rewards.naturalness import COLOURED

# No deadline: these properties must hold on a loaded machine too.
NO_DEADLINE = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])

FOLDER = Path(__file__).resolve().parents[2] / "assets" / "photos"
FILES = sorted(FOLDER.glob("*.jpg"))
FILE_SAMPLE = FILES[::9]


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    """Load every ninth bundled photo at preview size."""
    return [shrink(load_photo(file)) for file in FILE_SAMPLE]


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    return shrink(load_photo(FOLDER / "coffee.jpg"), 256)


def single_score(name: str, source: np.ndarray, picture: np.ndarray) -> float:
    value = REWARDS[name](source, [picture])[0]
    assert value is not None
    return value


def add_noise(picture: np.ndarray, sigma: float, seed: int = 0) -> np.ndarray:
    grain = np.random.default_rng(seed).normal(0, sigma, picture.shape)
    return np.clip(picture + grain, 0, 255).round().astype(np.uint8)


def downscaled_colourfulness(picture: np.ndarray) -> float:
    return image_metrics.colourfulness(image_metrics.downscale(picture))


def rotate_hues(picture: np.ndarray, degrees: int) -> np.ndarray:
    hsv = cv2.cvtColor(picture, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(degrees * 256 // 360)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def spearman(values: list[float]) -> float:
    """Return the rank correlation of values with their position; ties have the mean rank."""
    ranks = np.array([np.mean(np.flatnonzero(np.sort(values) == value)) for value in values])
    return float(np.corrcoef(ranks, np.arange(len(values)))[0, 1])


# ── Every reward ─────────────────────────────────────────────────────────────────────────────────────────────────────

pictures = arrays.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3)))


@pytest.mark.parametrize("name", REWARDS)
@NO_DEADLINE
@given(source=pictures, candidates=st.lists(pictures, max_size=4))
def test_scores_are_in_range_for_any_pictures(name: str, source: np.ndarray, candidates: list[np.ndarray]) -> None:
    values = REWARDS[name](source, candidates)
    assert len(values) == len(candidates)
    for value in values:
        assert value is None or (type(value) is float and 0 <= value <= 1)


@pytest.mark.parametrize("name", REWARDS)
def test_rewards_are_deterministic_and_keep_the_order(name: str, scene: np.ndarray) -> None:
    rng = np.random.default_rng(5)
    group = [render(scene, random_recipe(rng)) for _ in range(6)]
    order = rng.permutation(6)
    values = REWARDS[name](scene, group)
    assert values == REWARDS[name](scene.copy(), [picture.copy() for picture in group])
    assert REWARDS[name](scene, [group[index] for index in order]) == pytest.approx(
        [values[index] for index in order], abs=1e-12
    )
    assert len(set(values)) > 1


@pytest.mark.parametrize("name", ["sharpness", "colour"])
def test_scores_are_independent_of_the_group(name: str, scene: np.ndarray) -> None:
    rng = np.random.default_rng(6)
    group = [render(scene, random_recipe(rng)) for _ in range(4)]
    assert REWARDS[name](scene, group) == [single_score(name, scene, picture) for picture in group]


def test_an_empty_group_has_no_scores(scene: np.ndarray) -> None:
    assert score_pictures(scene, []) == [] and score_recipes(scene, []) == []


def test_score_recipes_equals_direct_reward_calls(scene: np.ndarray) -> None:
    rng = np.random.default_rng(8)
    large = cv2.resize(scene, None, fx=3, fy=3, interpolation=cv2.INTER_CUBIC)
    recipes = [random_recipe(rng) for _ in range(5)]
    scored = score_recipes(large, recipes)
    small = shrink(large, 512)
    for name, reward in REWARDS.items():
        assert [item.scores[name] for item in scored] == reward(small, [render(small, recipe) for recipe in recipes])
    assert [item.recipe for item in scored] == recipes


def test_fidelity_ignores_the_crop(scene: np.ndarray) -> None:
    same, cropped, mono = score_recipes(scene, [Recipe(), Recipe(crop=(10, 0, 90, 95)), Recipe(look="mono")])
    assert same.fidelity == 0 and cropped.fidelity == 0
    assert mono.fidelity > 5


# ── Sharpness ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_sharpness_falls_with_every_step_of_blur(photos: list[np.ndarray]) -> None:
    for file, photo in zip(FILE_SAMPLE, photos):
        steps = [photo] + [cv2.GaussianBlur(photo, (0, 0), sigma) for sigma in (0.5, 0.7, 1, 1.4, 2, 2.8, 4, 5.6, 8)]
        for source in (None, photo):
            values = [single_score("sharpness", step if source is None else source, step) for step in steps]
            assert spearman(values) <= -0.98, (file.name, values)


def test_noise_does_not_raise_sharpness(photos: list[np.ndarray]) -> None:
    for file, photo in zip(FILE_SAMPLE, photos):
        clean = single_score("sharpness", photo, photo)
        for sigma in (2, 5, 10, 20, 35):
            noisy = add_noise(photo, sigma)
            assert single_score("sharpness", photo, noisy) <= clean + 0.05, (file.name, sigma)
            assert single_score("sharpness", noisy, noisy) <= clean + 0.05, (file.name, sigma, "as its own source")


def test_halos_lower_sharpness(photos: list[np.ndarray]) -> None:
    for file, photo in zip(FILE_SAMPLE, photos):
        values = []
        for amount in (0.5, 3, 6):
            blurred = cv2.GaussianBlur(photo, (0, 0), 2).astype(np.float32)
            values.append(
                single_score("sharpness", photo, np.clip(photo + amount * (photo - blurred), 0, 255).astype(np.uint8))
            )
        assert values[2] < 0.5 * max(*values[:2], single_score("sharpness", photo, photo)), (file.name, values)
        assert values[2] < 0.05, (file.name, values)


def test_a_soft_photo_gains_from_sharpening_and_a_crisp_one_does_not(scene: np.ndarray) -> None:
    soft = cv2.GaussianBlur(scene, (0, 0), 1.2)
    crisp = render(scene, Recipe(sharpening=60))
    assert (
        single_score("sharpness", soft, render(soft, Recipe(sharpening=60)))
        > single_score("sharpness", soft, soft) + 0.03
    )
    assert (
        single_score("sharpness", crisp, render(crisp, Recipe(sharpening=60)))
        < single_score("sharpness", crisp, crisp) - 0.05
    )


def test_black_and_white_does_not_raise_sharpness(photos: list[np.ndarray]) -> None:
    mono = [render(photo, Recipe(look="mono")) for photo in photos]
    gains = [
        single_score("sharpness", photo, grey) - single_score("sharpness", photo, photo)
        for photo, grey in zip(photos, mono)
    ]
    assert max(gains) < 0.05 and np.mean(gains) < 0


def test_noise_estimate_matches_added_noise(photos: list[np.ndarray]) -> None:
    for sigma in (3, 8, 15):
        estimates = []
        for photo in photos:
            grey = cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY)
            grain = np.random.default_rng(0).normal(0, sigma, grey.shape)
            estimates.append(noise(np.clip(grey + grain, 0, 255).round().astype(np.uint8)) * 255)
        assert abs(np.median(estimates) / sigma - 1) < 0.2


def test_detail_matches_the_laplacian_of_the_smoothed_picture() -> None:
    grey = (127 + 90 * np.sin(np.mgrid[0:64, 0:80][1] / 2.0)).astype(np.uint8)
    smooth = cv2.sepFilter2D(grey / 255.0, cv2.CV_64F, *[np.array([1, 2, 1]) / 4] * 2)
    expected = np.sqrt((cv2.Laplacian(smooth, cv2.CV_64F) ** 2).mean())
    assert detail(grey) == pytest.approx(expected, rel=0.08)  # a small coarse part is added


# ── Colour ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_black_and_white_lowers_the_colour_score_of_a_coloured_photo(photos: list[np.ndarray]) -> None:
    for file, photo in zip(FILE_SAMPLE, photos):
        if downscaled_colourfulness(photo) < 20:
            continue
        grey = single_score("colour", photo, render(photo, Recipe(look="mono")))
        assert grey < 0.6 * single_score("colour", photo, photo), file.name


def test_moderate_saturation_raises_the_score_of_a_dull_photo(photos: list[np.ndarray]) -> None:
    checked = 0
    for file, photo in zip(FILE_SAMPLE, photos):
        dull = render(photo, Recipe(saturation=-50))
        if not COLOURED < measure(dull).colour_spread < 10:
            continue  # black and white, toned, or not dull
        checked += 1
        for level in (20, 40):
            assert single_score("colour", dull, render(dull, Recipe(saturation=level))) > single_score(
                "colour", dull, dull
            ), file.name
    assert checked >= 5


def test_oversaturation_lowers_the_score(photos: list[np.ndarray]) -> None:
    for file, photo in zip(FILE_SAMPLE, photos):
        if downscaled_colourfulness(photo) < 3:
            continue
        best = max(single_score("colour", photo, render(photo, Recipe(saturation=level))) for level in (0, 20, 40, 60))
        over = render(render(photo, Recipe(saturation=100)), Recipe(saturation=100))
        assert single_score("colour", photo, over) < 0.75 * best, file.name


def test_clipping_and_hue_shifts_lower_the_score(photos: list[np.ndarray]) -> None:
    for file, photo in zip(FILE_SAMPLE, photos):
        if measure(photo).colour_spread < 8:
            continue  # a toned photo may gain from another tone
        untouched = single_score("colour", photo, photo)
        clipped = np.clip(photo * (280 / np.percentile(photo, 50)), 0, 255).astype(
            np.uint8
        )  # half of all values clipped
        assert single_score("colour", photo, clipped) < untouched, file.name
        shifted = [single_score("colour", photo, rotate_hues(photo, degrees)) for degrees in (30, 90, 180)]
        assert untouched > shifted[0] > shifted[1] and untouched > shifted[2], (file.name, untouched, shifted)


def test_colourfulness_matches_hasler_and_suesstrunk(photos: list[np.ndarray]) -> None:
    for photo in photos:
        red, green, blue = np.moveaxis(photo.astype(np.float64), 2, 0)
        rg, yb = red - green, (red + green) / 2 - blue
        m = np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())
        assert image_metrics.colourfulness(photo.astype(np.float32) / 255) == pytest.approx(m, rel=1e-4, abs=1e-3)
        assert abs(downscaled_colourfulness(photo) - m) < 0.5 + 0.15 * m  # on the small version: a little lower


# ── Creativity ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_unchanged_photo_has_no_novelty(photos: list[np.ndarray]) -> None:
    for photo in photos:
        (unchanged,), (sharpened,) = (
            comparison.compare(photo, [picture]) for picture in (photo, render(photo, Recipe(sharpening=30)))
        )
        assert novelty(unchanged) == 0 and novelty(sharpened) < 0.1


def test_identical_candidates_gain_nothing_from_novelty(scene: np.ndarray) -> None:
    teal, sepia = render(scene, Recipe(look="teal", warmth=-40)), render(scene, Recipe(look="sepia"))
    alone = single_score("creativity", scene, sepia)
    first, copy = REWARDS["creativity"](scene, [sepia, sepia.copy()])
    assert first == copy
    assert first is not None and first < 0.85 * alone
    first, second, third = REWARDS["creativity"](scene, [sepia, teal, sepia])
    assert first == third == copy and second is not None and second > 0.9 * single_score("creativity", scene, teal)


def test_a_varied_group_scores_higher_than_a_uniform_one(scene: np.ndarray) -> None:
    sepia, alike = render(scene, Recipe(look="sepia")), render(scene, Recipe(look="sepia", exposure=5))
    other = render(scene, Recipe(exposure=-40, warmth=-50))
    varied, uniform = (REWARDS["creativity"](scene, [sepia, second])[0] for second in (other, alike))
    assert varied is not None and uniform is not None and varied > 1.15 * uniform


def test_noise_is_not_creative(photos: list[np.ndarray]) -> None:
    rng = np.random.default_rng(1)
    for photo in photos:
        untouched = single_score("creativity", photo, photo)
        random = rng.integers(0, 256, photo.shape, dtype=np.uint8)
        shuffled = rng.permutation(photo.reshape(-1, 3)).reshape(photo.shape)
        black, upside_down = np.zeros_like(photo), np.ascontiguousarray(photo[::-1])
        for picture in (random, shuffled, black, upside_down):
            assert single_score("creativity", photo, picture) < 0.1
        assert single_score("creativity", photo, add_noise(photo, 40)) < untouched


# ── Metrics ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_align_locates_a_crop_exactly(photos: list[np.ndarray]) -> None:
    rng = np.random.default_rng(4)
    for photo in photos:
        height, width = photo.shape[:2]
        for _ in range(4):
            recipe = random_recipe(rng).replace(crop=(10, 15, 85, 90))
            pair = image_metrics.align(photo, render(photo, recipe))
            assert pair.box[:2] == (width * 10 // 100 / width, height * 15 // 100 / height), recipe
            assert pair.source.shape == pair.picture.shape


def test_align_resizes_larger_pictures(scene: np.ndarray) -> None:
    twice = cv2.resize(scene, None, fx=2, fy=2)
    pair = image_metrics.align(scene, twice)
    assert pair.picture.shape == scene.shape and pair.area == 1


def test_ciede2000_matches_published_pairs() -> None:
    """Compare with pairs from Sharma, Wu and Dalal (2005), table 1."""
    pairs = [
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, -1.0, 2.0), (50, 0, 0), 2.3669),
        ((50, 2.49, -0.001), (50, -2.49, 0.0009), 7.1792),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((2.0776, 0.0795, -1.135), (0.9033, -0.0636, -0.5514), 0.9082),
    ]
    first, second, expected = (np.array(values, np.float64) for values in zip(*pairs))
    assert np.allclose(image_metrics.ciede2000(first, second), expected, atol=1e-4)


def test_structural_similarity_ignores_exposure(scene: np.ndarray) -> None:
    small, brighter = (
        cv2.cvtColor(image_metrics.downscale(picture), cv2.COLOR_RGB2GRAY)
        for picture in (scene, render(scene, Recipe(exposure=30, contrast=-20)))
    )
    assert image_metrics.structural_similarity(small, brighter) > 0.97
    assert image_metrics.structural_similarity(small, np.random.default_rng(0).random(small.shape, np.float32)) < 0.3
