"""Measures of one picture: its tones, colours, casts, clipping and detail, as absolute numbers."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from rewards import image_metrics
from rewards.focus import detail


@dataclass(frozen=True)
class Measures:
    """Measures of a picture (without its border).

    L* and chroma are CIELAB's, of a version `image_metrics.SMALL_SIDE` px long; shares are of the pixels.

    Attributes:
        lab: The small version, float32 [h, w, 3] CIELAB.
        grey: Luminance at full size, uint8.
        light: Mean L*, 0..100.
        contrast: Standard deviation of L*.
        black_point: First percentile of L*.
        white_point: 99th percentile of L*.
        detail: Root mean square Laplacian less noise, see `focus.detail`.
        chroma: Mean chroma.
        colour_spread: Mean distance of a* and b* from their mean: how many colours there are beyond a common tint.
        neutral_cast: Chroma of the mean colour of the least colourful third: 0 if greys are grey.
        light_cast: Chroma of the median colour of the lightest 15 %.
        white: Share of white pixels (all channels >= 252).
        black: Share of black pixels (all channels <= 4).
        saturated: Share of coloured pixels with a channel at its end.
    """

    lab: np.ndarray
    grey: np.ndarray
    light: float
    contrast: float
    black_point: float
    white_point: float
    detail: float
    chroma: float
    colour_spread: float
    neutral_cast: float
    light_cast: float
    white: float
    black: float
    saturated: float


def measure(picture: np.ndarray) -> Measures:
    """Measure a picture (uint8 [H, W, 3] RGB)."""
    lab = image_metrics.to_lab(as_seen(picture))
    flat = lab.reshape(-1, 3)
    chroma = np.hypot(flat[:, 1], flat[:, 2])
    ordered = np.sort(flat[:, 0])
    last = len(ordered) - 1
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    neutral = flat[np.argpartition(chroma, last // 3)[: last // 3 + 1], 1:].mean(axis=0)
    lights = np.median(flat[flat[:, 0] >= ordered[int(0.85 * last)], 1:], axis=0)
    sample = picture[::4, ::2]
    highest, lowest = sample.max(axis=-1), sample.min(axis=-1)
    saturated = ((highest >= 254) & (lowest < 250)) | ((lowest <= 1) & (highest > 8))
    return Measures(
        lab=lab,
        grey=grey,
        light=float(flat[:, 0].mean()),
        contrast=float(flat[:, 0].std()),
        black_point=float(ordered[round(0.01 * last)]),
        white_point=float(ordered[round(0.99 * last)]),
        detail=detail(grey),
        chroma=float(chroma.mean()),
        colour_spread=float(np.hypot(*(flat[:, 1:] - flat[:, 1:].mean(axis=0)).T).mean()),
        neutral_cast=float(np.hypot(*neutral)),
        light_cast=float(np.hypot(*lights)),
        white=float((lowest >= 252).mean()),
        black=float((highest <= 4).mean()),
        saturated=float(saturated.mean()),
    )


def as_seen(picture: np.ndarray) -> np.ndarray:
    """Scale a picture (uint8) to a long side of `image_metrics.SMALL_SIDE` px; float32 sRGB 0..1. None is enlarged."""
    small = image_metrics.downscale(picture, 2 * image_metrics.SMALL_SIDE)
    height, width = small.shape[:2]
    scale = image_metrics.SMALL_SIDE / max(height, width)
    if scale >= 1:
        return small
    return cv2.resize(
        small, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=cv2.INTER_AREA
    )
