"""The reward `creativity`: new against the photo and against the group's other pictures, and still a picture of it.

    creativity = fresh * recognisable * distinct

- fresh = exp(-(ln(n / FRESH) / WIDTH)^2 / 2), n = hypot(mean CIEDE2000 to the source, REFRAMED * share cut away): 0 for
  the source itself, 1 where the change is plain to see (about 12), less again where hardly anything is left of it.
- recognisable = structure^4 * readable * exp(-burnt / BURNT): the structure term of SSIM (Wang, Bovik, Sheikh and
  Simoncelli, 2004) is what is left of the content, near 0 for noise; readable asks for light and contrast as
  photographs have them, exp(-((mean L* - LIGHT) / LIGHT_WIDTH)^2 / 2) and the same of a spread of L* below CONTRAST;
  burnt is the new share of clipped pixels.
- distinct = 1 - exp(-(d / DISTINCT)^2), d the distance to the nearest other candidate of the group: as n, but between
  the sorted L*, a* and b* of both (a Wasserstein distance). Identical candidates score 0. A single candidate has nobody
  to differ from: distinct is 1, and its score is its novelty against the photo.

So what is fresh depends on the photo: a dark one can be opened, a bright one deepened, a vivid one calmed.
"""

from __future__ import annotations

import cv2
import numpy as np

from rewards import image_metrics as compare

FRESH, WIDTH = 12.0, 0.35
REFRAMED = 15.0
LIGHT, LIGHT_WIDTH = 52.0, 8.0
CONTRAST, CONTRAST_WIDTH = 20.0, 6.0
BURNT = 0.3
DISTINCT = 6.0
_QUANTILES = 33


def creativity(source: np.ndarray, candidates: list[np.ndarray]) -> list[float | None]:
    """Scores 0..1 of candidates (uint8 RGB) as one group; the module says how."""
    pairs = [compare.pair(source, picture) for picture in candidates]
    views = [_View(pair) for pair in pairs]
    return [_alone(view) * _distinct(view, views[:at] + views[at + 1 :]) for at, view in enumerate(views)]


class _View:
    """A candidate as this reward measures it."""

    def __init__(self, pair: compare.Pair) -> None:
        before, after = compare.small(pair.source), compare.small(pair.picture)
        lab_before, self.lab = compare.lab(before), compare.lab(after)
        self.box = pair.box
        self.change = compare.difference(lab_before, self.lab)
        self.cut = 1 - pair.area
        self.structure = compare.structure(before, after)
        self.burnt = max(0.0, compare.clipped(pair.picture) - compare.clipped(pair.source))
        self.palette = _palette(self.lab)


def _alone(view: _View) -> float:
    novelty = float(np.hypot(view.change, REFRAMED * view.cut))
    fresh = np.exp(-((np.log(max(novelty, 1e-3) / FRESH) / WIDTH) ** 2) / 2)
    return float(fresh * view.structure**4 * _readable(view.lab[..., 0]) * np.exp(-view.burnt / BURNT))


def _readable(light: np.ndarray) -> float:
    mean, spread = (float(value[0, 0]) for value in cv2.meanStdDev(light))
    flat = max(0.0, CONTRAST - spread) / CONTRAST_WIDTH
    return float(np.exp(-(((mean - LIGHT) / LIGHT_WIDTH) ** 2 + flat**2) / 2))


def _palette(lab: np.ndarray) -> np.ndarray:
    """Evenly spaced quantiles of L*, a* and b*: [33, 3]."""
    values = np.sort(lab.reshape(-1, 3), axis=0)
    return values[np.linspace(0, len(values) - 1, _QUANTILES).round().astype(int)]


def _distinct(view: _View, others: list[_View]) -> float:
    if not others:
        return 1.0
    nearest = min(_distance(view, other) for other in others)
    return float(1 - np.exp(-((nearest / DISTINCT) ** 2)))


def _distance(one: _View, other: _View) -> float:
    colours = np.linalg.norm(np.abs(one.palette - other.palette).mean(axis=0))
    return float(np.hypot(colours, REFRAMED * (1 - _overlap(one.box, other.box))))


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Intersection over union of two boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return shared / (sum(areas) - shared)
