"""`python -m bench.reward_examples`: draw examples of low and high scores for each reward into docs/images.

For an undamaged and a flawed photo: an edit that the reward punishes, the untouched photo, and the best recipe that
hill climbing finds, each with its score. Each picture is scored as a group of one.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from bench.adversaries import PHOTOS, climb, total
from recipes import Recipe, load_photo, render, save_picture, shrink
from rewards import REWARDS, RewardFunction
from training.contact_sheet import SheetColumn, draw_sheets

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
# Reward -> an edit that it punishes, and a flaw that an edit can repair.
LOW = {
    "sharpness": Recipe(sharpening=100, crop=(40, 0, 75, 100)),
    "colour": Recipe(warmth=80, saturation=80),
    "creativity": Recipe(look="fade", crop=(0, 30, 100, 80)),
}
FLAW = {
    "sharpness": Recipe(contrast=-50),
    "colour": Recipe(saturation=-70, warmth=-30),
    "creativity": Recipe(exposure=-60, contrast=-30),
}
UNDAMAGED, FLAWED = "astronaut", "coffee"
EVALUATIONS, WIDTH = 500, 1400  # recipes that are scored; px of a picture


def _scores(photos: list[np.ndarray], recipes: list[Recipe], function: RewardFunction) -> list[float]:
    return [total(photo, render(photo, recipe), function) for photo, recipe in zip(photos, recipes, strict=True)]


def draw(reward: str) -> np.ndarray:
    """Draw the examples of a reward: uint8 RGB."""
    undamaged, other = (shrink(load_photo(PHOTOS / f"{name}.jpg")) for name in (UNDAMAGED, FLAWED))
    flawed = render(other, FLAW[reward])
    if reward == "sharpness":
        flawed = cv2.GaussianBlur(flawed, (0, 0), 1.2)
    photos = [undamaged, flawed]

    function = RewardFunction({reward: 1.0})
    best = [climb(photo, function, EVALUATIONS)[0] for photo in photos]
    columns = [
        SheetColumn(title, recipes, _scores(photos, recipes, function))
        for title, recipes in (
            ("Low", [LOW[reward]] * 2),
            ("Untouched", [Recipe()] * 2),
            ("High: the best recipe found", best),
        )
    ]
    return np.asarray(draw_sheets(photos, ["undamaged", "flawed"], columns)[0])


def main() -> None:
    """Write one picture per reward."""
    for reward in REWARDS:
        save_picture(shrink(draw(reward), WIDTH), Recipe(), IMAGES / f"rewards-{reward}.jpg")


if __name__ == "__main__":
    main()
