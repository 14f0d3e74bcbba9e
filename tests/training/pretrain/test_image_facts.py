"""What is measured in photos: attributes, colours, areas, and sentences that say just that."""

import numpy as np
import pytest

from recipes import Recipe, load_photo, render
from training.data.bundled import bundled_photos
from training.pretrain import image_facts as facts


def flat(value: tuple[int, int, int], height: int = 120, width: int = 180) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def words(photo: np.ndarray) -> dict[str, str]:
    values = facts.measure(photo).values
    return {name: attribute.word(values[name]) for name, attribute in facts.ATTRIBUTES.items()}


def test_plain_pictures_get_the_words_they_deserve() -> None:
    assert words(flat((20, 20, 20)))["brightness"] == "dark"
    assert words(flat((230, 230, 230)))["brightness"] == "bright"
    assert words(flat((128, 128, 128)))["colours"] == "grey"
    assert words(flat((220, 120, 20)))["warmth"] == "warm"
    assert words(flat((20, 90, 220)))["warmth"] == "cool"
    assert words(flat((9, 9, 9), 200, 100))["orientation"] == "portrait"
    assert words(flat((9, 9, 9), 100, 100))["orientation"] == "square"


@pytest.mark.parametrize(
    ("colour", "name"),
    [((230, 20, 20), "red"), ((20, 160, 40), "green"), ((20, 60, 220), "blue"), ((250, 220, 30), "yellow"),
     ((128, 128, 128), "grey"), ((250, 250, 250), "white"), ((5, 5, 5), "black"), ((110, 65, 20), "brown")],
)  # fmt: skip
def test_colours_have_their_usual_names(colour: tuple[int, int, int], name: str) -> None:
    shares = facts.measure(flat(colour)).shares
    assert max(shares, key=lambda key: shares[key]) == name
    assert sum(shares.values()) == pytest.approx(1)


def test_blur_is_measured_on_every_photo() -> None:
    import cv2

    for info in bundled_photos("held-out"):
        photo = load_photo(info.path)
        soft = cv2.GaussianBlur(photo, (0, 0), 3)
        assert facts.measure(soft).values["sharpness"] < facts.measure(photo).values["sharpness"]


@pytest.mark.parametrize(
    ("name", "background", "patch"),
    [("brightest area", (60, 60, 60), (240, 240, 240)), ("darkest area", (200, 200, 200), (10, 10, 10)),
     ("most colourful area", (120, 120, 120), (200, 60, 60)), ("main subject", (90, 120, 90), (220, 40, 40))],
)  # fmt: skip
def test_an_area_is_where_it_was_painted(name: str, background: tuple, patch: tuple) -> None:
    photo = flat(background, 160, 320)
    photo[40:80, 80:160] = patch
    area = facts.areas(photo, (name,))[name]
    assert area.box == pytest.approx((0.25, 0.25, 0.5, 0.5), abs=1.01 / facts.AREA_GRID)
    assert 0.25 < area.point[0] < 0.5
    assert 0.25 < area.point[1] < 0.5


def test_the_sharpest_area_is_the_one_with_detail() -> None:
    photo = flat((120, 120, 120), 160, 320)
    photo[80:160, 240:320] = np.random.default_rng(1).integers(0, 255, (80, 80, 1))
    x0, y0, x1, y1 = facts.areas(photo, ("sharpest area",))["sharpest area"].box
    assert x0 >= 0.6
    assert y0 >= 0.35
    assert (x1, y1) == (1.0, 1.0)


def test_best_rectangle_beats_all_others() -> None:
    level = np.random.default_rng(2).normal(-0.2, 1, (6, 6))
    left, top, right, bottom = facts.best_rectangle(level)
    best = max(
        level[y0:y1, x0:x1].sum()
        for y0 in range(6)
        for y1 in range(y0 + 1, 7)
        for x0 in range(6)
        for x1 in range(x0 + 1, 7)
    )
    assert level[top:bottom, left:right].sum() == pytest.approx(best)


def test_captions_say_only_what_is_true_and_the_judge_finds_each_fact() -> None:
    expected = {"short": 3, "normal": 4, "long": 8}
    for info in bundled_photos()[::7]:
        measured = facts.measure(load_photo(info.path))
        for length, least in expected.items():
            judged = facts.judge(facts.caption(measured, length), measured)
            assert len(judged) >= least
            assert all(ok for _, ok in judged), judged


def test_the_judge_finds_lies() -> None:
    photo = load_photo(bundled_photos("held-out")[0].path)
    measured = facts.measure(render(photo, Recipe(exposure=-100)))
    assert ("brightness: bright", False) in facts.judge("The brightness is bright.", measured)
    wrong = {"left": "right", "right": "left", "centre": "left"}[measured.place()[1]]
    row = {"top": "bottom", "bottom": "top", "middle": "top"}[measured.place()[0]]
    assert not facts.judge(f"The subject is at the {row} {wrong}.", measured)[0][1]
    absent = min(measured.shares, key=lambda key: measured.shares[key])
    assert facts.judge(f"It is mostly {absent}.", measured) == [(f"colour: {absent}", False)]


def test_questions_have_true_answers() -> None:
    measured = facts.measure(load_photo(bundled_photos("train")[3].path))
    rng = np.random.default_rng(0)
    for _ in range(100):
        question, answer = facts.question_and_answer(measured, rng)
        judged = facts.judge(answer, measured)
        assert all(ok for _, ok in judged)
        assert judged or (answer == facts.UNKNOWN_ANSWER and question in facts.UNKNOWN_QUESTIONS)
