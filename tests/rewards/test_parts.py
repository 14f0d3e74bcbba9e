"""The parts of the rewards: borders, subject, naturalness and guard, each on pictures made to offend against it."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from recipes import Recipe, load_photo, render, shrink
from rewards import EQUAL_WEIGHTS, score_pictures
from rewards.borders import content_box
from rewards.comparison import Comparison, compare
from rewards.guard import framing_fault, guard
from rewards.measures import measure
from rewards.naturalness import burn_fault, colour_fault, focus_fault, restraint_fault, tone_fault
from rewards.sharpness import sharpening_fault
from rewards.subject import find_faces

FOLDER = Path(__file__).resolve().parents[2] / "assets" / "photos"


@pytest.fixture(scope="module")
def portrait() -> np.ndarray:
    return shrink(load_photo(FOLDER / "astronaut.jpg"))


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    return shrink(load_photo(FOLDER / "forest4.jpg"))


def comparison(photo: np.ndarray, **recipe: object) -> Comparison:
    """Compare a photo with its edit by a recipe."""
    return compare(photo, [render(photo, Recipe(**recipe))])[0]  # type: ignore[arg-type]


def total(photo: np.ndarray, picture: np.ndarray) -> float:
    """Return the total under equal weights."""
    return EQUAL_WEIGHTS.total(score_pictures(photo, [picture])[0]) or 0.0


def test_faces_are_found_where_they_are(portrait: np.ndarray) -> None:
    ((left, top, right, bottom),) = find_faces(portrait)
    assert left < 0.44 < right and top < 0.24 < bottom and right - left < 0.3
    assert find_faces(np.zeros((64, 96, 3), np.uint8)) == []


def test_a_cut_head_costs_more_than_cut_background(portrait: np.ndarray) -> None:
    head, background = comparison(portrait, crop=(0, 20, 100, 100)), comparison(portrait, crop=(0, 0, 100, 80))
    assert head.framing.head_lost > 0.2 and background.framing.head_lost == 0
    assert framing_fault(head.framing) > 1.3 * framing_fault(background.framing)
    assert total(portrait, render(portrait, Recipe(crop=(0, 20, 100, 100)))) < 0.7 * total(portrait, portrait)


def test_strips_and_corners_lose_nearly_everything(portrait: np.ndarray) -> None:
    for crop in ((40, 0, 60, 100), (0, 40, 100, 60), (40, 40, 60, 60)):
        assert guard(comparison(portrait, crop=crop)) < 0.3 * guard(comparison(portrait))


@pytest.mark.parametrize("value", [8, 128, 250])
def test_a_border_is_found_and_removing_it_is_free(scene: np.ndarray, value: int) -> None:
    height, width = scene.shape[:2]
    framed = np.full((round(height / 0.8), round(width / 0.8), 3), value, np.uint8)
    x, y = round(0.1 * framed.shape[1]), round(0.1 * framed.shape[0])
    framed[y : y + height, x : x + width] = scene
    framed = shrink(framed)
    assert content_box(framed) == pytest.approx((0.1, 0.1, 0.9, 0.9), abs=0.02)
    removed = comparison(framed, crop=(10, 10, 90, 90))
    assert removed.border < 0.05 and removed.framing.kept > 0.95
    assert guard(removed) > 2 * guard(comparison(framed))


def test_a_crop_that_shows_only_the_border_scores_nearly_nothing(scene: np.ndarray) -> None:
    framed = cv2.copyMakeBorder(scene, 150, 150, 150, 150, cv2.BORDER_CONSTANT, value=(20, 20, 20))
    assert total(framed, np.ascontiguousarray(framed[:, :150])) < 0.1


def test_undamaged_photos_have_no_border() -> None:
    files = sorted(FOLDER.glob("*.jpg"))[::3]
    assert [file.name for file in files if content_box(shrink(load_photo(file))) != (0, 0, 1, 1)] == []


def test_a_veil_and_grey_whites_are_faults_of_tone(scene: np.ndarray) -> None:
    untouched = tone_fault(measure(scene))
    veiled = cv2.addWeighted(scene, 0.6, scene, 0, 70)
    assert tone_fault(measure(veiled)) > untouched + 0.5
    assert tone_fault(measure(render(scene, Recipe(contrast=-60)))) > untouched + 0.5


def test_blown_and_crushed_ends_are_faults_of_tone(scene: np.ndarray) -> None:
    for recipe in ({"exposure": 100}, {"exposure": -60, "contrast": 100}):
        assert burn_fault(comparison(scene, **recipe)) > 0.3
    assert burn_fault(comparison(scene)) == 0


def test_neon_dull_and_casts_are_faults_of_colour(scene: np.ndarray) -> None:
    def fault(**recipe: object) -> float:
        edited = comparison(scene, **recipe)
        return colour_fault(edited.measures, edited.photo)

    assert fault(saturation=100) > fault() + 0.2
    assert fault(look="mono") > fault() + 0.5
    tinted = cv2.transform(scene, np.array([[1.1, 0, 0, 25], [0, 1, 0, 0], [0, 0, 0.8, -10]], np.float32))
    (cast,) = compare(scene, [tinted])
    assert colour_fault(cast.measures, cast.photo) > fault() + 0.2


def test_the_fault_of_focus_grows_with_blur(scene: np.ndarray) -> None:
    faults = [focus_fault(measure(cv2.GaussianBlur(scene, (0, 0), sigma))) for sigma in (0.5, 1, 2, 4, 8)]
    assert faults == sorted(faults) and len(set(faults)) == 5


def test_halos_are_a_fault_of_sharpening(scene: np.ndarray) -> None:
    blurred = cv2.GaussianBlur(scene, (0, 0), 2).astype(np.float32)
    ringing = np.clip(scene + 4 * (scene - blurred), 0, 255).astype(np.uint8)
    assert sharpening_fault(compare(scene, [ringing])[0]) > 1
    assert sharpening_fault(compare(scene, [scene])[0]) == pytest.approx(0, abs=0.02)


def test_a_good_photo_is_to_be_changed_less_than_a_flawed_one(scene: np.ndarray) -> None:
    flawed = render(scene, Recipe(exposure=-60, contrast=-60, saturation=-60))
    assert restraint_fault(comparison(flawed, exposure=40)) < 0.6 * restraint_fault(comparison(scene, exposure=40))


def test_restoring_a_flawed_photo_wins_against_leaving_it_alone(portrait: np.ndarray, scene: np.ndarray) -> None:
    for photo in (portrait, scene):
        for flaw, repair in (
            ({"contrast": -60}, {"contrast": 60}),
            ({"exposure": -80}, {"exposure": 80}),
            ({"saturation": -100}, {"saturation": 70}),
        ):
            flawed = render(photo, Recipe(**flaw))
            assert total(flawed, render(flawed, Recipe(**repair))) > total(flawed, flawed), flaw


def test_a_warm_cast_on_a_portrait_is_worth_removing_in_part(portrait: np.ndarray) -> None:
    warm = render(portrait, Recipe(warmth=100))
    assert total(warm, render(warm, Recipe(warmth=-40))) > total(warm, warm)


def test_comparisons_follow_the_pixels_and_not_the_array(scene: np.ndarray) -> None:
    picture = scene.copy()
    before = total(scene, picture)
    picture[:] = 255 - picture
    assert total(scene, picture) != before
