"""Image facts: attributes, colours, areas, and the sentences that state them."""

import cv2
import numpy as np
import pytest

from recipes import Recipe, load_photo, render
from training.data.bundled import bundled_photos
from training.pretrain import image_facts


def flat_photo(value: tuple[int, int, int], height: int = 120, width: int = 180) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def classify(photo: np.ndarray) -> dict[str, str]:
    values = image_facts.measure(photo).values
    return {name: attribute.classify(values[name]) for name, attribute in image_facts.ATTRIBUTES.items()}


def test_flat_pictures_are_classified() -> None:
    assert classify(flat_photo((20, 20, 20)))["brightness"] == "dark"
    assert classify(flat_photo((230, 230, 230)))["brightness"] == "bright"
    assert classify(flat_photo((128, 128, 128)))["colours"] == "grey"
    assert classify(flat_photo((220, 120, 20)))["warmth"] == "warm"
    assert classify(flat_photo((20, 90, 220)))["warmth"] == "cool"
    assert classify(flat_photo((9, 9, 9), 200, 100))["orientation"] == "portrait"
    assert classify(flat_photo((9, 9, 9), 100, 100))["orientation"] == "square"


@pytest.mark.parametrize(
    ("colour", "name"),
    [((230, 20, 20), "red"), ((20, 160, 40), "green"), ((20, 60, 220), "blue"), ((250, 220, 30), "yellow"),
     ((128, 128, 128), "grey"), ((250, 250, 250), "white"), ((5, 5, 5), "black"), ((110, 65, 20), "brown")],
)  # fmt: skip
def test_colours_have_their_usual_names(colour: tuple[int, int, int], name: str) -> None:
    shares = image_facts.measure(flat_photo(colour)).shares
    assert max(shares, key=lambda key: shares[key]) == name
    assert sum(shares.values()) == pytest.approx(1)


def test_blur_lowers_the_measured_sharpness() -> None:
    for info in bundled_photos("held-out"):
        photo = load_photo(info.path)
        soft = cv2.GaussianBlur(photo, (0, 0), 3)
        assert image_facts.measure(soft).values["sharpness"] < image_facts.measure(photo).values["sharpness"]


@pytest.mark.parametrize(
    ("name", "background", "patch"),
    [("brightest area", (60, 60, 60), (240, 240, 240)), ("darkest area", (200, 200, 200), (10, 10, 10)),
     ("most colourful area", (120, 120, 120), (200, 60, 60)), ("main subject", (90, 120, 90), (220, 40, 40))],
)  # fmt: skip
def test_areas_locates_a_painted_patch(name: str, background: tuple, patch: tuple) -> None:
    photo = flat_photo(background, 160, 320)
    photo[40:80, 80:160] = patch
    area = image_facts.areas(photo, (name,))[name]
    assert area.box == pytest.approx((0.25, 0.25, 0.5, 0.5), abs=1.01 / image_facts.AREA_GRID)
    assert 0.25 < area.point[0] < 0.5
    assert 0.25 < area.point[1] < 0.5


def test_the_sharpest_area_is_the_textured_one() -> None:
    photo = flat_photo((120, 120, 120), 160, 320)
    photo[80:160, 240:320] = np.random.default_rng(1).integers(0, 255, (80, 80, 1))
    x0, y0, x1, y1 = image_facts.areas(photo, ("sharpest area",))["sharpest area"].box
    assert x0 >= 0.6
    assert y0 >= 0.35
    assert (x1, y1) == (1.0, 1.0)


def test_best_rectangle_has_the_largest_sum() -> None:
    level = np.random.default_rng(2).normal(-0.2, 1, (6, 6))
    left, top, right, bottom = image_facts.best_rectangle(level)
    best = max(
        level[y0:y1, x0:x1].sum()
        for y0 in range(6)
        for y1 in range(y0 + 1, 7)
        for x0 in range(6)
        for x1 in range(x0 + 1, 7)
    )
    assert level[top:bottom, left:right].sum() == pytest.approx(best)


def test_captions_state_true_facts_that_check_statements_finds() -> None:
    minimum = {"short": 3, "normal": 4, "long": 8}
    for info in bundled_photos()[::7]:
        facts = image_facts.measure(load_photo(info.path))
        for length, count in minimum.items():
            statements = image_facts.check_statements(image_facts.caption(facts, length), facts)
            assert len(statements) >= count
            assert all(ok for _, ok in statements), statements


def test_check_statements_finds_false_statements() -> None:
    photo = load_photo(bundled_photos("held-out")[0].path)
    facts = image_facts.measure(render(photo, Recipe(exposure=-100)))
    assert ("brightness: bright", False) in image_facts.check_statements("The brightness is bright.", facts)
    wrong = {"left": "right", "right": "left", "centre": "left"}[facts.subject_cell()[1]]
    row = {"top": "bottom", "bottom": "top", "middle": "top"}[facts.subject_cell()[0]]
    assert not image_facts.check_statements(f"The subject is at the {row} {wrong}.", facts)[0][1]
    absent = min(facts.shares, key=lambda key: facts.shares[key])
    assert image_facts.check_statements(f"It is mostly {absent}.", facts) == [(f"colour: {absent}", False)]


def test_question_and_answer_gives_true_answers() -> None:
    facts = image_facts.measure(load_photo(bundled_photos("train")[3].path))
    rng = np.random.default_rng(0)
    for _ in range(100):
        question, answer = image_facts.question_and_answer(facts, rng)
        statements = image_facts.check_statements(answer, facts)
        assert all(ok for _, ok in statements)
        assert statements or (answer == image_facts.UNKNOWN_ANSWER and question in image_facts.UNKNOWN_QUESTIONS)
