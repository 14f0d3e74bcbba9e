"""The reward `creativity`: different from the photo and from the rest of the group, and still recognisable.

    creativity = novelty * recognisable * distinct

- novelty = exp(-(ln(n / NOVELTY) / WIDTH)^2 / 2), n = hypot(mean CIEDE2000 to the source, REFRAMING * cropped share):
  0 for the source itself, 1 for a clearly visible change (n about 12), lower again for an extreme one.
- recognisable = structure^4 * exposure * exp(-clipping / CLIPPING): structure is the structure term of SSIM (Wang,
  Bovik, Sheikh and Simoncelli, 2004), near 0 for noise; exposure is 1 for the lightness and contrast of photographs,
  exp(-((mean L* - LIGHTNESS) / LIGHTNESS_WIDTH)^2 / 2) and the same for a standard deviation of L* below CONTRAST;
  clipping is the additional share of clipped pixels.
- distinct = 1 - exp(-(d / DISTINCT)^2), d the distance to the nearest other candidate of the group: as n, but between
  the sorted L*, a* and b* of both (a Wasserstein distance). Identical candidates score 0; for a single candidate
  distinct is 1.

Which change is rewarded depends on the photo: brightening a dark one, darkening a bright one, muting a vivid one.
"""

from __future__ import annotations

import cv2
import numpy as np

from rewards import image_metrics

NOVELTY, WIDTH = 12.0, 0.35
REFRAMING = 15.0
LIGHTNESS, LIGHTNESS_WIDTH = 52.0, 8.0
CONTRAST, CONTRAST_WIDTH = 20.0, 6.0
CLIPPING = 0.3
DISTINCT = 6.0
_QUANTILES = 33


def creativity(source: np.ndarray, candidates: list[np.ndarray]) -> list[float | None]:
    """Score candidates (uint8 RGB) from 0 to 1 as one group; see the module's docstring for the formula."""
    group = [_Candidate(image_metrics.align(source, picture)) for picture in candidates]
    return [
        _individual_score(candidate) * _distinctness(candidate, group[:index] + group[index + 1 :])
        for index, candidate in enumerate(group)
    ]


class _Candidate:
    """Measurements of a candidate against its source."""

    def __init__(self, pair: image_metrics.AlignedPair) -> None:
        before, after = image_metrics.downscale(pair.source), image_metrics.downscale(pair.picture)
        lab_before, self.lab = image_metrics.to_lab(before), image_metrics.to_lab(after)
        self.box = pair.box
        self.change = image_metrics.mean_ciede2000(lab_before, self.lab)
        self.cropped = 1 - pair.area
        self.structure = image_metrics.structural_similarity(before, after)
        self.clipped = max(0.0, image_metrics.clipped_share(pair.picture) - image_metrics.clipped_share(pair.source))
        values = np.sort(self.lab.reshape(-1, 3), axis=0)
        self.palette = values[np.linspace(0, len(values) - 1, _QUANTILES).round().astype(int)]  # [33, 3] of L*, a*, b*


def _individual_score(candidate: _Candidate) -> float:
    """Return novelty * recognisable."""
    change = float(np.hypot(candidate.change, REFRAMING * candidate.cropped))
    novelty = np.exp(-((np.log(max(change, 1e-3) / NOVELTY) / WIDTH) ** 2) / 2)
    mean, spread = (float(value[0, 0]) for value in cv2.meanStdDev(candidate.lab[..., 0]))
    flatness = max(0.0, CONTRAST - spread) / CONTRAST_WIDTH
    exposure = float(np.exp(-(((mean - LIGHTNESS) / LIGHTNESS_WIDTH) ** 2 + flatness**2) / 2))
    return float(novelty * candidate.structure**4 * exposure * np.exp(-candidate.clipped / CLIPPING))


def _distinctness(candidate: _Candidate, others: list[_Candidate]) -> float:
    if not others:
        return 1.0
    nearest = min(_distance(candidate, other) for other in others)
    return float(1 - np.exp(-((nearest / DISTINCT) ** 2)))


def _distance(first: _Candidate, second: _Candidate) -> float:
    colours = np.linalg.norm(np.abs(first.palette - second.palette).mean(axis=0))
    return float(np.hypot(colours, REFRAMING * (1 - image_metrics.box_iou(first.box, second.box))))
