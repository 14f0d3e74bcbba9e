"""Agreement with the judged pairs, and adversaries, on a part of the photos (`python -m rewards.agreement`: all)."""

from __future__ import annotations

import numpy as np
import pytest

from bench.adversaries import HACKS, PHOTOS, applicable_hacks, climb, total
from recipes import load_photo, shrink
from rewards import EQUAL_WEIGHTS
from rewards.agreement import SUBSETS, agreements, interval, load_pairs

MINIMUM = {  # shares on all pairs less a margin; the fast test uses the pairs of every third photo
    "equal weights": {"undamaged": 0.85, "undamaged, between models": 0.8, "degraded": 0.75, "degraded, clear": 0.85},
    "sharpness": {"undamaged": 0.8},
    "colour": {"undamaged": 0.8},
    "creativity": {"undamaged": 0.75},
}


def shares(step: int) -> dict[str, dict[str, float]]:
    """Return the agreement on the pairs of every n-th photo, by reward function and subset."""
    pairs = load_pairs()
    photos = sorted({pair.photo for pair in pairs})[::step]
    pairs = [pair for pair in pairs if pair.photo in photos]
    right = agreements(pairs)
    return {
        name: {subset: float(values[[belongs(pair) for pair in pairs]].mean()) for subset, belongs in SUBSETS.items()}
        for name, values in right.items()
    }


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_rewards_agree_with_the_judges(step: int) -> None:
    measured = shares(step)
    margin = 0.0 if step == 1 else 0.06
    for name, row in MINIMUM.items():
        for subset, least in row.items():
            assert measured[name][subset] >= least - margin, (name, subset, measured[name])


def test_pairs_are_those_on_which_both_judgements_agree() -> None:
    pairs = load_pairs()
    assert sum(not pair.degraded for pair in pairs) == 212 and sum(pair.degraded for pair in pairs) == 110
    assert all(pair.source.is_file() and pair.preferred != pair.rejected for pair in pairs)


def test_interval_resamples_whole_photos() -> None:
    right = np.array([True] * 8 + [False] * 8)
    share, low, high = interval(right, [str(index // 8) for index in range(16)])
    assert share == 0.5 and low == 0 and high == 1


def test_hacks_score_below_the_untouched_photo() -> None:
    below = []
    for file in sorted(PHOTOS.glob("*.jpg"))[::12]:
        photo = shrink(load_photo(file))
        untouched = total(photo, photo, EQUAL_WEIGHTS)
        below += [total(photo, HACKS[name](photo), EQUAL_WEIGHTS) < untouched for name in applicable_hacks(photo)]
    assert np.mean(below) >= 0.95


def test_hill_climbing_keeps_the_head_and_the_frame() -> None:
    photo = shrink(load_photo(PHOTOS / "astronaut.jpg"), 256)
    recipe, best = climb(photo, EQUAL_WEIGHTS, 300)
    left, top, right, bottom = recipe.crop
    assert best >= total(photo, photo, EQUAL_WEIGHTS)
    assert top == 0 and right - left >= 80 and bottom - top >= 80
    assert recipe.look not in ("mono", "noir", "fade", "sepia")
