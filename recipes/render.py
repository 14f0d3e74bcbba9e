"""Render recipes with OpenCV in float32.

Order: crop, exposure, warmth, contrast, saturation, sharpening, look. Values are clipped once, at the end, so that a
later operation can recover values that an earlier one pushed out of range; negating a level inverts it.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import cv2
import numpy as np

from recipes.recipe import Recipe

PREVIEW_SIDE = 512
REC709 = np.array([0.2126, 0.7152, 0.0722], np.float32)  # luminance of red, green, blue (ITU-R BT.709)
_NO_CROP = (0, 0, 100, 100)


def render(photo: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Apply a recipe to a photo.

    Args:
        photo: uint8 [H, W, 3] RGB.
        recipe: The edit.

    Returns:
        uint8 [h, w, 3] RGB; the photo itself for the identity recipe.
    """
    if recipe.is_identity:
        return photo
    picture = _crop(photo, recipe)
    if recipe.replace(crop=_NO_CROP).is_identity:
        return np.ascontiguousarray(picture)
    picture = _tone(picture, recipe)
    if recipe.saturation:
        picture = _saturate(picture, 2 ** (1.5 * recipe.saturation / 100))
    if recipe.sharpening:
        picture = _sharpen(picture, recipe.sharpening / 50, max(0.5, 0.0016 * max(photo.shape[:2])))
    picture = _LOOKS[recipe.look](picture)
    return _to_uint8(picture)


def render_all(photo: np.ndarray, recipes: list[Recipe]) -> list[np.ndarray]:
    """Render several recipes in parallel threads (OpenCV releases the GIL)."""
    if len(recipes) < 2:
        return [render(photo, recipe) for recipe in recipes]
    return list(_thread_pool().map(lambda recipe: render(photo, recipe), recipes))


@cache
def _thread_pool() -> ThreadPoolExecutor:
    """Return the process's thread pool, shared because short-lived threads leak memory."""
    return ThreadPoolExecutor(max(1, min(cv2.getNumberOfCPUs(), 8)), "render")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_thread_pool.cache_clear)  # a forked process has no threads


def shrink(photo: np.ndarray, long_side: int = PREVIEW_SIDE) -> np.ndarray:
    """Downscale a photo (uint8 [H, W, 3]) to a long side in pixels by area averaging; never enlarge it."""
    height, width = photo.shape[:2]
    scale = long_side / max(height, width)
    if scale >= 1:
        return photo
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(photo, size, interpolation=cv2.INTER_AREA)


def crop_box(photo: np.ndarray, recipe: Recipe) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom in pixels of the part of a photo [H, W, 3] that a recipe keeps; never empty."""
    height, width = photo.shape[:2]
    left, top, right, bottom = recipe.crop
    x0, y0 = width * left // 100, height * top // 100
    return x0, y0, max(x0 + 1, -(-width * right // 100)), max(y0 + 1, -(-height * bottom // 100))


def _crop(photo: np.ndarray, recipe: Recipe) -> np.ndarray:
    left, top, right, bottom = crop_box(photo, recipe)
    return photo[top:bottom, left:right]


def _tone(picture: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Apply exposure and warmth in linear light, then contrast on sRGB values, as one lookup table of 256 x 3."""
    levels = np.repeat((np.arange(256, dtype=np.float64) / 255)[:, None], 3, axis=1)
    if recipe.exposure or recipe.warmth:
        levels = _linear_to_srgb(
            _srgb_to_linear(levels) * (2 ** (1.5 * recipe.exposure / 100) * _warm_gains(recipe.warmth))
        )
    levels = 0.5 + (levels - 0.5) * 2 ** (recipe.contrast / 100)
    return cv2.LUT(np.ascontiguousarray(picture), levels.astype(np.float32).reshape(1, 256, 3))


def _warm_gains(warmth: int) -> np.ndarray:
    """Return linear gains of red, green, blue that keep the Rec.709 luminance of a neutral grey."""
    gains = np.array([2 ** (0.5 * warmth / 100), 1.0, 2 ** (-0.5 * warmth / 100)])
    return gains / (gains @ REC709.astype(np.float64))


def _srgb_to_linear(coded: np.ndarray) -> np.ndarray:
    """Convert sRGB values 0..1 to linear light (IEC 61966-2-1)."""
    return np.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)


def _linear_to_srgb(linear: np.ndarray) -> np.ndarray:
    """Convert linear light to sRGB values; the curve continues above 1."""
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * np.maximum(linear, 0) ** (1 / 2.4) - 0.055)


def _saturate(picture: np.ndarray, factor: float) -> np.ndarray:
    return cv2.transform(picture, factor * np.eye(3, dtype=np.float32) + (1 - factor) * np.tile(REC709, (3, 1)))


def _sharpen(picture: np.ndarray, amount: float, sigma: float) -> np.ndarray:
    """Apply an unsharp mask to the luminance: add `amount` times its difference from its Gaussian blur."""
    grey = cv2.transform(picture, REC709[None])
    detail = cv2.subtract(grey, cv2.GaussianBlur(grey, (0, 0), sigma, borderType=cv2.BORDER_REFLECT))
    return cv2.scaleAdd(cv2.merge([detail] * 3), amount, picture)


def _to_uint8(picture: np.ndarray) -> np.ndarray:
    """Scale 0..1 to 0..255, round and clip."""
    return cv2.addWeighted(picture, 255, picture, 0, 0, dtype=cv2.CV_8U)


def _none(picture: np.ndarray) -> np.ndarray:
    return picture


def _mono(picture: np.ndarray) -> np.ndarray:
    return cv2.transform(picture, np.tile(REC709, (3, 1)))


def _sepia(picture: np.ndarray) -> np.ndarray:
    """Tone grey brown: warm highlights, browner shadows."""
    return cv2.transform(picture, np.outer(np.array([1.07, 0.97, 0.78], np.float32), REC709))


def _fade(picture: np.ndarray) -> np.ndarray:
    """Imitate a faded print: lifted blacks, soft whites, less colour, slightly warm."""
    mix = 0.8 * np.eye(3, dtype=np.float32) + 0.2 * np.tile(REC709, (3, 1))
    scaled = np.array([[0.80], [0.78], [0.72]], np.float32) * mix
    return cv2.transform(picture, np.hstack([scaled, np.array([[0.13], [0.12], [0.13]], np.float32)]))


def _teal(picture: np.ndarray) -> np.ndarray:
    """Grade teal shadows and orange highlights: red rises and blue falls with luminance."""
    tilt = np.array([0.24, -0.08, -0.20], np.float32)
    matrix = np.eye(3, dtype=np.float32) + np.outer(tilt, REC709)
    return cv2.transform(picture, np.hstack([matrix, (-0.5 * tilt)[:, None]]))


def _noir(picture: np.ndarray) -> np.ndarray:
    """Convert to high-contrast black and white, red-filtered so that skies turn dark."""
    weights = 1.6 * np.array([0.45, 0.45, 0.10], np.float32)
    return cv2.transform(picture, np.hstack([np.tile(weights, (3, 1)), np.full((3, 1), -0.33, np.float32)]))


_LOOKS = {"none": _none, "mono": _mono, "sepia": _sepia, "fade": _fade, "teal": _teal, "noir": _noir}
