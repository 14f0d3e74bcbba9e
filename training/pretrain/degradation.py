"""Restoration: photos degraded at random, with the recipe that undoes it, and how well a recipe did so."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from recipes import Recipe, render, shrink
from training.pretrain.image_facts import lab

ERROR_SIDE = 160  # px: both pictures are compared at this long side
SPREAD = 65  # levels: standard deviation of the damage; what goes beyond -100..100 is drawn again
BLUR = 0.0045  # Gaussian sigma at level 100, as a share of the long side


@dataclass(frozen=True)
class Degraded:
    """A photo and its spoilt copy, both uint8 RGB, with the recipe that undoes the damage as far as one can."""

    original: np.ndarray
    spoilt: np.ndarray
    recipe: Recipe


def random_undo(rng: np.random.Generator) -> Recipe:
    """A recipe to be undone, with a crop in 35 of 100.

    Levels are normally distributed: then the likeliest answer to an unclear photo is a careful one. Sharpening is
    uniform, 0 in 15 of 100.
    """

    def level() -> int:
        while abs(value := round(rng.normal(0, SPREAD / 10)) * 10) > 100:
            pass
        return value

    edges = [int(rng.integers(0, 6)) * 5 if rng.random() < 0.6 else 0 for _ in range(4)]
    left, top, right, bottom = edges if rng.random() < 0.35 else (0, 0, 0, 0)
    tone = [level() for _ in range(4)]
    names = ("exposure", "contrast", "saturation", "warmth")
    return Recipe(
        crop=(left, top, 100 - right, 100 - bottom),
        **dict(zip(names, tone, strict=True)),
        sharpening=int(rng.integers(11)) * 10 if rng.random() < 0.85 else 0,
    )


def degrade(photo: np.ndarray, undo: Recipe, rng: np.random.Generator) -> np.ndarray:
    """The photo (uint8 [H, W, 3]) spoilt so that `undo` restores it: the negated levels, last operation first.

    Sharpening is undone by a Gaussian blur and a crop by a border around the photo, of one of five kinds.
    """
    spoilt = photo
    if undo.sharpening:
        spoilt = cv2.GaussianBlur(spoilt, (0, 0), max(0.3, undo.sharpening / 100 * BLUR * max(photo.shape[:2])))
    spoilt = render(spoilt, Recipe(saturation=-undo.saturation))
    spoilt = render(spoilt, Recipe(contrast=-undo.contrast))
    spoilt = render(spoilt, Recipe(exposure=-undo.exposure, warmth=-undo.warmth))
    return frame(spoilt, undo.crop, rng) if undo.crop != (0, 0, 100, 100) else spoilt


def frame(photo: np.ndarray, crop: tuple[int, int, int, int], rng: np.random.Generator) -> np.ndarray:
    """The photo inside a larger canvas, at `crop` (percent): black, white, grey, its mean colour, or a blurred copy."""
    left, top, right, bottom = crop
    height, width = photo.shape[:2]
    full_width, full_height = round(width * 100 / (right - left)), round(height * 100 / (bottom - top))
    kind = rng.integers(5)
    if kind == 4:
        canvas = cv2.GaussianBlur(cv2.resize(photo, (full_width, full_height)), (0, 0), max(photo.shape[:2]) * 0.05)
    else:
        colour = ((8, 8, 8), (250, 250, 250), (128, 128, 128), photo.reshape(-1, 3).mean(0))[kind]
        canvas = np.full((full_height, full_width, 3), colour, np.float32).round().astype(np.uint8)
    x, y = min(full_width * left // 100, full_width - width), min(full_height * top // 100, full_height - height)
    canvas[y : y + height, x : x + width] = photo
    return canvas


def spoil(photo: np.ndarray, rng: np.random.Generator, share: float = 0.93) -> Degraded:
    """A random degradation of the photo; a share of the photos stay as they are, and their recipe is the identity."""
    undo = random_undo(rng) if rng.random() < share else Recipe()
    return Degraded(photo, degrade(photo, undo, rng), undo)


def error(picture: np.ndarray, original: np.ndarray) -> float:
    """Mean CIELAB distance (CIE 1976) of two RGB uint8 pictures, brought to the original's shape at `ERROR_SIDE`."""
    reference = shrink(original, ERROR_SIDE)
    size = (reference.shape[1], reference.shape[0])
    return float(
        np.linalg.norm(lab(cv2.resize(picture, size, interpolation=cv2.INTER_AREA)) - lab(reference), axis=-1).mean()
    )
