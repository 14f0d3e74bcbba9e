"""What every reward must be, and what each of the three promises, on drawn and on bundled photos."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from recipes import Recipe, load_photo, random_recipe, render, shrink
from rewards import REWARDS, score, score_recipes
from rewards import image_metrics as compare
from rewards.colour import colourfulness as colourfulness_of
from rewards.sharpness import detail, noise

# A busy machine must not fail a property.
CALM = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])

FOLDER = Path(__file__).resolve().parents[2] / "assets" / "photos"
FILES = sorted(FOLDER.glob("*.jpg"))
SOME = FILES[::9]


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    """A ninth of the bundled photos, as large as previews."""
    return [shrink(load_photo(file)) for file in SOME]


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    return shrink(load_photo(FOLDER / "coffee.jpg"), 256)


def one(name: str, source: np.ndarray, picture: np.ndarray) -> float:
    value = REWARDS[name](source, [picture])[0]
    assert value is not None
    return value


def noisy(picture: np.ndarray, sigma: float, seed: int = 0) -> np.ndarray:
    grain = np.random.default_rng(seed).normal(0, sigma, picture.shape)
    return np.clip(picture + grain, 0, 255).round().astype(np.uint8)


def colourfulness(picture: np.ndarray) -> float:
    return colourfulness_of(compare.small(picture))


def turned(picture: np.ndarray, degrees: int) -> np.ndarray:
    hsv = cv2.cvtColor(picture, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(degrees * 256 // 360)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def spearman(values: list[float]) -> float:
    """Rank correlation of values with their position; ties take the mean rank."""
    ranks = np.array([np.mean(np.flatnonzero(np.sort(values) == value)) for value in values])
    return float(np.corrcoef(ranks, np.arange(len(values)))[0, 1])


# ── Every reward ─────────────────────────────────────────────────────────────────────────────────────────────────────

pictures = arrays.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3)))


@pytest.mark.parametrize("name", REWARDS)
@CALM
@given(source=pictures, candidates=st.lists(pictures, max_size=4))
def test_any_pictures_score_in_range(name: str, source: np.ndarray, candidates: list[np.ndarray]) -> None:
    values = REWARDS[name](source, candidates)
    assert len(values) == len(candidates)
    for value in values:
        assert value is None or (type(value) is float and 0 <= value <= 1)


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_is_deterministic_and_follows_the_order(name: str, scene: np.ndarray) -> None:
    rng = np.random.default_rng(5)
    group = [render(scene, random_recipe(rng)) for _ in range(6)]
    order = rng.permutation(6)
    values = REWARDS[name](scene, group)
    assert values == REWARDS[name](scene.copy(), [picture.copy() for picture in group])
    assert REWARDS[name](scene, [group[at] for at in order]) == pytest.approx([values[at] for at in order], abs=1e-12)
    assert len(set(values)) > 1


@pytest.mark.parametrize("name", ["sharpness", "colour"])
def test_the_group_does_not_matter_to(name: str, scene: np.ndarray) -> None:
    rng = np.random.default_rng(6)
    group = [render(scene, random_recipe(rng)) for _ in range(4)]
    assert REWARDS[name](scene, group) == [one(name, scene, picture) for picture in group]


def test_no_candidates_no_scores(scene: np.ndarray) -> None:
    assert score(scene, []) == [] and score_recipes(scene, []) == []


def test_the_screen_and_a_reward_called_alone_agree(scene: np.ndarray) -> None:
    rng = np.random.default_rng(8)
    large = cv2.resize(scene, None, fx=3, fy=3, interpolation=cv2.INTER_CUBIC)
    recipes = [random_recipe(rng) for _ in range(5)]
    scored = score_recipes(large, recipes)
    small = shrink(large, 512)
    for name, reward in REWARDS.items():
        assert [item.scores[name] for item in scored] == reward(small, [render(small, recipe) for recipe in recipes])
    assert [item.recipe for item in scored] == recipes


def test_fidelity_is_reported(scene: np.ndarray) -> None:
    same, cut, mono = score_recipes(scene, [Recipe(), Recipe(crop=(10, 0, 90, 95)), Recipe(look="mono")])
    assert same.fidelity == 0 and cut.fidelity == 0  # cropped alike
    assert mono.fidelity > 5


# ── Sharpness ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_sharpness_falls_with_every_step_of_blur(photos: list[np.ndarray]) -> None:
    for file, photo in zip(SOME, photos):
        steps = [photo] + [cv2.GaussianBlur(photo, (0, 0), sigma) for sigma in (0.5, 0.7, 1, 1.4, 2, 2.8, 4, 5.6, 8)]
        for source in (None, photo):
            values = [one("sharpness", step if source is None else source, step) for step in steps]
            assert spearman(values) <= -0.98, (file.name, values)


def test_sharpness_does_not_rise_with_noise(photos: list[np.ndarray]) -> None:
    for file, photo in zip(SOME, photos):
        clean = one("sharpness", photo, photo)
        for sigma in (2, 5, 10, 20, 35):
            grainy = noisy(photo, sigma)
            assert one("sharpness", photo, grainy) <= clean + 0.05, (file.name, sigma)
            assert one("sharpness", grainy, grainy) <= clean + 0.05, (file.name, sigma, "as its own source")


def test_sharpness_falls_with_halos(photos: list[np.ndarray]) -> None:
    for file, photo in zip(SOME, photos):
        values = []
        for amount in (0.5, 3, 6):
            blurred = cv2.GaussianBlur(photo, (0, 0), 2).astype(np.float32)
            values.append(one("sharpness", photo, np.clip(photo + amount * (photo - blurred), 0, 255).astype(np.uint8)))
        assert values[2] < 0.5 * max(*values[:2], one("sharpness", photo, photo)), (file.name, values)
        assert values[2] < 0.05, (file.name, values)


def test_a_soft_photo_gains_from_sharpening_and_a_crisp_one_does_not(scene: np.ndarray) -> None:
    soft = cv2.GaussianBlur(scene, (0, 0), 0.8)
    crisp = render(scene, Recipe(sharpening=60))
    assert one("sharpness", soft, render(soft, Recipe(sharpening=60))) > one("sharpness", soft, soft) + 0.1
    assert one("sharpness", crisp, render(crisp, Recipe(sharpening=60))) < one("sharpness", crisp, crisp) - 0.1


def test_black_and_white_is_not_the_way_to_be_sharp(photos: list[np.ndarray]) -> None:
    mono = [render(photo, Recipe(look="mono")) for photo in photos]
    gains = [one("sharpness", photo, grey) - one("sharpness", photo, photo) for photo, grey in zip(photos, mono)]
    assert max(gains) < 0.05 and np.mean(gains) < 0


def test_noise_is_estimated(photos: list[np.ndarray]) -> None:
    for sigma in (3, 8, 15):
        estimates = []
        for photo in photos:
            grey = cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY)
            grain = np.random.default_rng(0).normal(0, sigma, grey.shape)
            estimates.append(noise(np.clip(grey + grain, 0, 255).round().astype(np.uint8)) * 255)
        assert abs(np.median(estimates) / sigma - 1) < 0.2


def test_detail_is_the_laplacian_of_the_smoothed_picture() -> None:
    grey = (127 + 90 * np.sin(np.mgrid[0:64, 0:80][1] / 2.0)).astype(np.uint8)
    smooth = cv2.sepFilter2D(grey / 255.0, cv2.CV_64F, *[np.array([1, 2, 1]) / 4] * 2)
    expected = np.sqrt((cv2.Laplacian(smooth, cv2.CV_64F) ** 2).mean())
    assert detail(grey) == pytest.approx(expected, rel=0.08)  # a small coarse part is added


# ── Colour ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_grey_is_lowest(photos: list[np.ndarray]) -> None:
    rng = np.random.default_rng(2)
    for photo in photos:
        grey = one("colour", photo, render(photo, Recipe(look="mono")))
        assert grey < 1e-6
        assert all(one("colour", photo, render(photo, random_recipe(rng))) >= grey for _ in range(3))


def test_some_saturation_raises_a_dull_photo(photos: list[np.ndarray]) -> None:
    tried = 0
    for file, photo in zip(SOME, photos):
        dull = render(photo, Recipe(saturation=-50))
        if not 3 < colourfulness(dull) < 40:
            continue  # black and white, or not dull
        tried += 1
        for level in (20, 40):
            assert one("colour", dull, render(dull, Recipe(saturation=level))) > one("colour", dull, dull), file.name
    assert tried >= 6


def test_over_saturation_lowers(photos: list[np.ndarray]) -> None:
    for file, photo in zip(SOME, photos):
        if colourfulness(photo) < 3:
            continue
        best = max(one("colour", photo, render(photo, Recipe(saturation=level))) for level in (0, 20, 40, 60))
        over = render(render(photo, Recipe(saturation=100)), Recipe(saturation=100))
        assert one("colour", photo, over) < 0.75 * best, file.name


def test_clipping_and_hue_shifts_lower(photos: list[np.ndarray]) -> None:
    for file, photo in zip(SOME, photos):
        if colourfulness(photo) < 3:
            continue
        untouched = one("colour", photo, photo)
        burnt = np.clip(photo * (280 / np.percentile(photo, 50)), 0, 255).astype(np.uint8)  # half of all values clipped
        assert one("colour", photo, burnt) < untouched, file.name
        shifted = [one("colour", photo, turned(photo, degrees)) for degrees in (30, 90, 180)]
        assert untouched > shifted[0] > shifted[1] and untouched > shifted[2], (file.name, untouched, shifted)


def test_colourfulness_is_hasler_and_suesstrunks(photos: list[np.ndarray]) -> None:
    for photo in photos:
        red, green, blue = np.moveaxis(photo.astype(np.float64), 2, 0)
        rg, yb = red - green, (red + green) / 2 - blue
        m = np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())
        assert colourfulness_of(photo.astype(np.float32) / 255) == pytest.approx(m, rel=1e-4, abs=1e-3)
        assert abs(colourfulness(photo) - m) < 0.5 + 0.15 * m  # on the small version: a little lower


# ── Creativity ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_photo_itself_is_not_creative(photos: list[np.ndarray]) -> None:
    for photo in photos:
        assert one("creativity", photo, photo) < 1e-6
        assert one("creativity", photo, render(photo, Recipe(sharpening=30))) < 0.05


def test_identical_candidates_score_zero(scene: np.ndarray) -> None:
    teal = render(scene, Recipe(look="teal", warmth=-40))
    sepia = render(scene, Recipe(look="sepia"))
    assert one("creativity", scene, sepia) > 0.1
    assert REWARDS["creativity"](scene, [sepia, sepia.copy()]) == [0, 0]
    first, second, third = REWARDS["creativity"](scene, [sepia, teal, sepia])
    assert first == third == 0 and second > 0


def test_a_varied_group_beats_a_monotonous_one(scene: np.ndarray) -> None:
    sepia, alike = render(scene, Recipe(look="sepia")), render(scene, Recipe(look="sepia", exposure=5))
    other = render(scene, Recipe(exposure=-40, warmth=-50))
    assert REWARDS["creativity"](scene, [sepia, other])[0] > 2 * REWARDS["creativity"](scene, [sepia, alike])[0]


def test_noise_is_not_creative(photos: list[np.ndarray]) -> None:
    rng = np.random.default_rng(1)
    for photo in photos:
        random = rng.integers(0, 256, photo.shape, dtype=np.uint8)
        shuffled = rng.permutation(photo.reshape(-1, 3)).reshape(photo.shape)
        black, upside_down = np.zeros_like(photo), photo[::-1]
        for picture in (random, shuffled, black, noisy(photo, 40)):
            assert one("creativity", photo, picture) < 0.1
        assert one("creativity", photo, np.ascontiguousarray(upside_down)) < 0.3


# ── Comparing ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_crop_is_found_where_it_was_cut(photos: list[np.ndarray]) -> None:
    rng = np.random.default_rng(4)
    for photo in photos:
        height, width = photo.shape[:2]
        for _ in range(4):
            recipe = random_recipe(rng).replace(crop=(10, 15, 85, 90))
            pair = compare.pair(photo, render(photo, recipe))
            assert pair.box[:2] == (width * 10 // 100 / width, height * 15 // 100 / height), recipe
            assert pair.source.shape == pair.picture.shape


def test_another_size_is_compared_as_a_whole(scene: np.ndarray) -> None:
    twice = cv2.resize(scene, None, fx=2, fy=2)
    pair = compare.pair(scene, twice)
    assert pair.picture.shape == scene.shape and pair.area == 1


def test_ciede2000_on_published_pairs() -> None:
    """Pairs from Sharma, Wu and Dalal (2005), table 1."""
    pairs = [
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, -1.0, 2.0), (50, 0, 0), 2.3669),
        ((50, 2.49, -0.001), (50, -2.49, 0.0009), 7.1792),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((2.0776, 0.0795, -1.135), (0.9033, -0.0636, -0.5514), 0.9082),
    ]
    one_, other, expected = (np.array(values, np.float64) for values in zip(*pairs))
    assert np.allclose(compare.ciede2000(one_, other), expected, atol=1e-4)


def test_structure_ignores_light_and_sees_content(scene: np.ndarray) -> None:
    small = compare.small(scene)
    brighter = compare.small(render(scene, Recipe(exposure=30, contrast=-20)))
    assert compare.structure(small, brighter) > 0.97
    assert compare.structure(small, np.random.default_rng(0).random(small.shape, np.float32)) < 0.3
