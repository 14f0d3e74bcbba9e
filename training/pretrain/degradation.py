"""Degradation: photos degraded at random with the recipe that restores them, and the error that a recipe leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from recipes import Recipe, render, shrink
from training.pretrain.image_facts import to_lab

ERROR_SIDE = 160  # px: long side at which pictures are compared
LEVEL_STD = 65  # standard deviation of the levels; values beyond -100..100 are drawn again
SLIGHT_STD = 15  # standard deviation of the levels of a slight degradation
BLUR_SIGMA = 0.0045  # Gaussian sigma at level 100, as a share of the long side


@dataclass(frozen=True)
class DegradedPhoto:
    """A photo and a degraded copy.

    Attributes:
        original: uint8 RGB.
        degraded: uint8 RGB.
        inverse_recipe: The recipe that restores the degraded copy as far as possible.
    """

    original: np.ndarray
    degraded: np.ndarray
    inverse_recipe: Recipe


def random_inverse_recipe(rng: np.random.Generator) -> Recipe:
    """Draw the recipe that a degradation inverts.

    Levels are normally distributed, so that the most likely answer to an ambiguous photo is a moderate one. Sharpening
    is uniform, and 0 with probability 0.15. The probability of a crop is 0.35.
    """

    def level() -> int:
        while abs(value := round(rng.normal(0, LEVEL_STD / 10)) * 10) > 100:
            pass
        return value

    edges = [int(rng.integers(0, 6)) * 5 if rng.random() < 0.6 else 0 for _ in range(4)]
    left, top, right, bottom = edges if rng.random() < 0.35 else (0, 0, 0, 0)
    levels: dict[str, Any] = {name: level() for name in ("exposure", "contrast", "saturation", "warmth")}
    return Recipe(
        crop=(left, top, 100 - right, 100 - bottom),
        **levels,
        sharpening=int(rng.integers(11)) * 10 if rng.random() < 0.85 else 0,
    )


def degrade(photo: np.ndarray, inverse_recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    """Degrade a photo so that `inverse_recipe` restores it: the negated levels, last operation first.

    Sharpening is inverted by a Gaussian blur, and a crop by a border around the photo.

    Args:
        photo: uint8 [H, W, 3] RGB.
        inverse_recipe: The recipe to invert.
        rng: Chooses the kind of border.
    """
    recipe, degraded = inverse_recipe, photo
    if recipe.sharpening:
        sigma = max(0.3, recipe.sharpening / 100 * BLUR_SIGMA * max(photo.shape[:2]))
        degraded = cv2.GaussianBlur(degraded, (0, 0), sigma)
    degraded = render(degraded, Recipe(saturation=-recipe.saturation))
    degraded = render(degraded, Recipe(contrast=-recipe.contrast))
    degraded = render(degraded, Recipe(exposure=-recipe.exposure, warmth=-recipe.warmth))
    return add_border(degraded, recipe.crop, rng) if recipe.crop != (0, 0, 100, 100) else degraded


def add_border(photo: np.ndarray, crop: tuple[int, int, int, int], rng: np.random.Generator) -> np.ndarray:
    """Place a photo on a larger canvas so that `crop` (percent) cuts it out again.

    The canvas is black, white, grey, the photo's mean colour, or a blurred copy of it.
    """
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


def random_degradation(photo: np.ndarray, rng: np.random.Generator, probability: float = 0.93) -> DegradedPhoto:
    """Degrade a photo at random with a probability, else return it unchanged with the identity recipe."""
    inverse_recipe = random_inverse_recipe(rng) if rng.random() < probability else Recipe()
    return DegradedPhoto(photo, degrade(photo, inverse_recipe, rng), inverse_recipe)


def slight_degradation(photo: np.ndarray, rng: np.random.Generator) -> DegradedPhoto:
    """Degrade a photo slightly, or with probability 0.5 not at all: what a good photo needs."""
    if rng.random() < 0.5:
        return DegradedPhoto(photo, photo, Recipe())
    names = ("exposure", "contrast", "saturation", "warmth")
    levels: dict[str, Any] = {name: round(rng.normal(0, SLIGHT_STD / 10)) * 10 for name in names}
    inverse_recipe = Recipe(**levels, sharpening=int(rng.integers(4)) * 10)
    return DegradedPhoto(photo, degrade(photo, inverse_recipe, rng), inverse_recipe)


def lab_error(picture: np.ndarray, original: np.ndarray) -> float:
    """Return the mean CIELAB distance (CIE 1976) of two RGB uint8 pictures, resized to the original at `ERROR_SIDE`."""
    reference = shrink(original, ERROR_SIDE)
    resized = cv2.resize(picture, (reference.shape[1], reference.shape[0]), interpolation=cv2.INTER_AREA)
    return float(np.linalg.norm(to_lab(resized) - to_lab(reference), axis=-1).mean())
