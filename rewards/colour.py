"""The reward `colour`: colourful as photographs are, and true to the photo."""

from __future__ import annotations

import cv2
import numpy as np

from rewards import compare

NATURAL = 60.0  # colourfulness that scores best
WIDTH = 0.8  # natural logarithm around it


def colour(source: np.ndarray, candidates: list[np.ndarray]) -> list[float | None]:
    """First version; see the definition in the module's constants."""
    return [_one(compare.pair(source, picture)) for picture in candidates]


def _one(pair: compare.Pair) -> float:
    vivid = colourfulness(pair.picture)
    desire = np.exp(-((np.log(max(vivid, 1e-3) / NATURAL) / WIDTH) ** 2) / 2)
    burnt = max(0.0, compare.clipped(pair.picture) - compare.clipped(pair.source))
    one, other = compare.lab(compare.small(pair.source)), compare.lab(compare.small(pair.picture))
    light = float(np.abs(one[..., 0] - other[..., 0]).mean())
    return float(desire * np.exp(-burnt / 0.15 - (light / 25) ** 2 - (hue_shift(one, other) / 40) ** 2))


def colourfulness(picture: np.ndarray) -> float:
    """M of Hasler and Suesstrunk (2003) of a uint8 picture: 0 grey, 15 slightly, 33 moderately, 59 quite colourful."""
    values = compare.small(picture, 256) * 255
    red, green, blue = cv2.split(values)
    rg, yb = red - green, (red + green) / 2 - blue
    (m1, s1), (m2, s2) = (tuple(float(v[0, 0]) for v in cv2.meanStdDev(part)) for part in (rg, yb))
    return float(np.hypot(s1, s2) + 0.3 * np.hypot(m1, m2))


def hue_shift(one: np.ndarray, other: np.ndarray) -> float:
    """Mean turn of the hue in degrees between two CIELAB arrays, weighted by the chroma that both have."""
    c1, c2 = np.hypot(one[..., 1], one[..., 2]), np.hypot(other[..., 1], other[..., 2])
    dot = one[..., 1] * other[..., 1] + one[..., 2] * other[..., 2]
    weight = np.sqrt(c1 * c2)
    turn = np.degrees(np.arccos(np.clip(dot / np.maximum(c1 * c2, 1e-6), -1, 1)))
    return float((turn * weight).sum() / max(float(weight.sum()), 1e-6))
