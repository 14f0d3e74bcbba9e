"""The reward `colour`: colourful, and true to the photo.

    colour = M^3 / (M^3 + HALF^3) * exp(-vivid - pushed - clip - turn - change)

- M: the colourfulness of Hasler and Suesstrunk, "Measuring colourfulness in natural images" (2003); 0 is grey, 15
  slightly, 33 moderately, 45 averagely, 59 quite, 82 highly colourful. Grey scores 0; the first factor rises with M.
- vivid = (ln(M / max(M of the source, NATURAL)) / VIVID)^2 / 2 if positive: over-saturated, unless the photo was.
- pushed = (ln(M / (PUSHED * M of the source)) / PUSHED_WIDTH)^2 / 2 if positive: no longer this photo's colours.
- clip = new share of pixels with a channel at its end / CLIP.
- turn = (mean turn of the hue in degrees, weighted by chroma / TURN)^2.
- change = (mean CIEDE2000 to the source / CHANGE)^2 (fidelity; it is also reported beside the scores).

So a dull photo gains from some saturation, as much as it lacks; a vivid one is best left alone.
"""

from __future__ import annotations

import cv2
import numpy as np

from rewards import image_metrics as compare

HALF = 35.0
NATURAL = 60.0
VIVID = 0.3
PUSHED, PUSHED_WIDTH = 1.8, 0.3
CLIP = 0.6
TURN = 60.0
CHANGE = 28.0


def colour(source: np.ndarray, candidates: list[np.ndarray]) -> list[float | None]:
    """Scores 0..1 of candidates (uint8 RGB), each by itself; the module says how."""
    views: dict[tuple[float, ...], _View] = {}
    scores: list[float | None] = []
    for picture in candidates:
        pair = compare.pair(source, picture)
        if pair.box not in views:
            views[pair.box] = _View(pair.source)
        scores.append(_score(views[pair.box], _View(pair.picture)))
    return scores


class _View:
    """A picture as this reward measures it."""

    def __init__(self, picture: np.ndarray) -> None:
        small = compare.small(picture)
        self.colourfulness = colourfulness(small)
        self.clipped = compare.clipped(picture)
        self.lab = compare.lab(small)


def _score(source: _View, picture: _View) -> float:
    vivid = _beyond(picture.colourfulness, max(source.colourfulness, NATURAL)) / VIVID
    pushed = _beyond(picture.colourfulness, PUSHED * max(source.colourfulness, 1.0)) / PUSHED_WIDTH
    clip = max(0.0, picture.clipped - source.clipped) / CLIP
    turn = hue_turn(source.lab, picture.lab) / TURN
    change = compare.difference(source.lab, picture.lab) / CHANGE
    rich = (picture.colourfulness / HALF) ** 3
    return float(rich / (1 + rich) * np.exp(-(vivid**2 + pushed**2) / 2 - clip - turn**2 - change**2))


def _beyond(value: float, limit: float) -> float:
    return float(np.log(max(value / limit, 1.0)))


def colourfulness(picture: np.ndarray) -> float:
    """M of Hasler and Suesstrunk of float32 sRGB 0..1: spread plus 0.3 times the mean of R - G and (R + G) / 2 - B."""
    opponents = cv2.transform(picture, np.array([[1, -1, 0], [0.5, 0.5, -1]], np.float32))
    mean, spread = cv2.meanStdDev(opponents)
    return float(255 * (np.hypot(*spread[:, 0]) + 0.3 * np.hypot(*mean[:, 0])))


def hue_turn(one: np.ndarray, other: np.ndarray) -> float:
    """Mean turn of the hue in degrees between two CIELAB arrays [H, W, 3], weighted by the chroma that both have."""
    c1, c2 = (np.sqrt(lab[..., 1] ** 2 + lab[..., 2] ** 2) for lab in (one, other))
    both = np.maximum(c1 * c2, 1e-6)
    cosine = (one[..., 1] * other[..., 1] + one[..., 2] * other[..., 2]) / both
    weight = np.sqrt(both)
    return float(np.degrees((np.arccos(np.clip(cosine, -1, 1)) * weight).sum() / weight.sum()))
