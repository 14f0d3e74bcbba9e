"""The reward `creativity`: an attractive picture in a clearly different style, unlike the other candidates.

    creativity = guard * exp(-RESTRAINT restraint - QUALITY (colour + focus + sharpening))
               * (PLAIN + (1 - PLAIN) novelty distinct)

- guard: `guard.guard`, so that nothing is cut away and no tone is flattened; the faults are those of `naturalness` and
  of `sharpness`.
- novelty = 1 - exp(-(change / NOVELTY)^2), change the mean CIEDE2000 to the photo on their common part: the crop does
  not count. The photo itself has novelty 0 and keeps PLAIN: a bold edit must be attractive to gain.
- distinct = 1 - exp(-(d / DISTINCT)^2), d the distance to the nearest other candidate of the group: between the sorted
  L*, a* and b* of both (a Wasserstein distance), and REFRAMING * (1 - overlap of their crops). It is 1 for a single
  candidate. Identical candidates gain nothing from novelty.

The distance of styles is CIEDE2000 (Sharma, Wu and Dalal, 2005).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rewards import image_metrics
from rewards.comparison import Comparison, compare
from rewards.guard import guard
from rewards.naturalness import colour_fault, focus_fault, restraint_fault
from rewards.sharpness import sharpening_fault

PLAIN = 0.35
NOVELTY = 14.0
RESTRAINT, QUALITY = 0.98, 0.5
DISTINCT = 6.0
REFRAMING = 15.0


def creativity(source: np.ndarray, candidates: list[np.ndarray]) -> list[float | None]:
    """Score candidates (uint8 RGB) from 0 to 1 as one group; see the module's docstring for the formula."""
    group = compare(source, candidates)
    return [
        float(score_comparison(comparison, group[:index] + group[index + 1 :]))
        for index, comparison in enumerate(group)
    ]


def score_comparison(comparison: Comparison, others: Sequence[Comparison] = ()) -> float:
    """Score one candidate beside the others of its group, 0..1."""
    style = novelty(comparison) * _distinctness(comparison, others)
    return _quality(comparison) * (PLAIN + (1 - PLAIN) * style)


def _quality(comparison: Comparison) -> float:
    fault = colour_fault(comparison.measures, comparison.photo) + focus_fault(comparison.measures)
    fault = QUALITY * (fault + sharpening_fault(comparison)) + RESTRAINT * restraint_fault(comparison)
    return guard(comparison) * np.exp(-fault)


def novelty(comparison: Comparison) -> float:
    """Return how different the style is from the photo's, 0..1."""
    return 1 - np.exp(-((comparison.change / NOVELTY) ** 2))


def _distinctness(candidate: Comparison, others: Sequence[Comparison]) -> float:
    if not others:
        return 1.0
    nearest = min(_distance(candidate, other) for other in others)
    return 1 - np.exp(-((nearest / DISTINCT) ** 2))


def _distance(first: Comparison, second: Comparison) -> float:
    colours = np.linalg.norm(np.abs(first.palette - second.palette).mean(axis=0))
    return float(np.hypot(colours, REFRAMING * (1 - image_metrics.box_iou(first.box, second.box))))
