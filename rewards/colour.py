"""The reward `colour`: a colourful picture that stays true to the photo.

    colour = M^3 / (M^3 + HALF^3) * exp(-oversaturation - boost - clipping - hue_shift - change)

- M: the colourfulness of Hasler and Suesstrunk, "Measuring colourfulness in natural images" (2003); 0 is grey, 15
  slightly, 33 moderately, 45 averagely, 59 quite, 82 highly colourful. Grey scores 0; the first factor rises with M.
- oversaturation = (ln(M / max(M of the source, NATURAL)) / OVERSATURATION)^2 / 2 if positive.
- boost = (ln(M / (MAX_BOOST * M of the source)) / BOOST_WIDTH)^2 / 2 if positive: far more colourful than the photo.
- clipping = additional share of pixels with a clipped channel / CLIPPING.
- hue_shift = (mean hue shift in degrees, weighted by chroma / HUE_SHIFT)^2.
- change = (mean CIEDE2000 to the source / CHANGE)^2, the fidelity that is also reported beside the scores.

A dull photo therefore gains from moderate saturation, and a vivid photo from none.
"""

from __future__ import annotations

import cv2
import numpy as np

from rewards import image_metrics

HALF = 35.0
NATURAL = 60.0
OVERSATURATION = 0.3
MAX_BOOST, BOOST_WIDTH = 1.8, 0.3
CLIPPING = 0.6
HUE_SHIFT = 60.0
CHANGE = 28.0


def colour(source: np.ndarray, candidates: list[np.ndarray]) -> list[float | None]:
    """Score candidates (uint8 RGB) from 0 to 1, independent of the group; the module's docstring has the formula."""
    sources: dict[tuple[float, ...], _ColourStats] = {}  # by crop
    scores: list[float | None] = []
    for picture in candidates:
        pair = image_metrics.align(source, picture)
        if pair.box not in sources:
            sources[pair.box] = _ColourStats(pair.source)
        scores.append(_score(sources[pair.box], _ColourStats(pair.picture)))
    return scores


class _ColourStats:
    """Colourfulness, clipping and CIELAB values of a picture."""

    def __init__(self, picture: np.ndarray) -> None:
        small = image_metrics.downscale(picture)
        self.colourfulness = colourfulness(small)
        self.clipped = image_metrics.clipped_share(picture)
        self.lab = image_metrics.to_lab(small)


def _score(source: _ColourStats, picture: _ColourStats) -> float:
    oversaturation = _log_excess(picture.colourfulness, max(source.colourfulness, NATURAL)) / OVERSATURATION
    boost = _log_excess(picture.colourfulness, MAX_BOOST * max(source.colourfulness, 1.0)) / BOOST_WIDTH
    clipping = max(0.0, picture.clipped - source.clipped) / CLIPPING
    shift = hue_shift(source.lab, picture.lab) / HUE_SHIFT
    change = image_metrics.mean_ciede2000(source.lab, picture.lab) / CHANGE
    rich = (picture.colourfulness / HALF) ** 3
    return float(rich / (1 + rich) * np.exp(-(oversaturation**2 + boost**2) / 2 - clipping - shift**2 - change**2))


def _log_excess(value: float, limit: float) -> float:
    return float(np.log(max(value / limit, 1.0)))


def colourfulness(picture: np.ndarray) -> float:
    """Return M of Hasler and Suesstrunk for float32 sRGB 0..1: spread + 0.3 mean of R - G and (R + G) / 2 - B."""
    opponents = cv2.transform(picture, np.array([[1, -1, 0], [0.5, 0.5, -1]], np.float32))
    mean, spread = cv2.meanStdDev(opponents)
    return float(255 * (np.hypot(*spread[:, 0]) + 0.3 * np.hypot(*mean[:, 0])))


def hue_shift(first: np.ndarray, second: np.ndarray) -> float:
    """Return the mean hue difference in degrees of two CIELAB arrays [H, W, 3], weighted by their common chroma."""
    c1, c2 = (np.sqrt(lab[..., 1] ** 2 + lab[..., 2] ** 2) for lab in (first, second))
    product = np.maximum(c1 * c2, 1e-6)
    cosine = (first[..., 1] * second[..., 1] + first[..., 2] * second[..., 2]) / product
    weight = np.sqrt(product)
    return float(np.degrees((np.arccos(np.clip(cosine, -1, 1)) * weight).sum() / weight.sum()))
