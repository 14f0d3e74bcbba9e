"""The reward `sharpness`: a crisp picture of the whole subject, without halos.

    sharpness = guard * exp(-focus - restraint - halo - excess)

- guard: `guard.guard`; focus and restraint: `naturalness`. Detail is the root mean square of the Laplacian of the
  slightly smoothed luminance, a focus measure (Pertuz, Puig and Garcia, "Analysis of focus measure operators for
  shape-from-focus", 2013), less the white noise measured in the flattest blocks (Immerkaer, "Fast noise variance
  estimation", 1996).
- halo = (mean overshoot beyond the local extremes of the photo, at its tones / HALO)^2.
- excess = EXCESS * ln(detail / max(detail of the photo, NATURAL)) / 0.3 if positive: crisper than the photo and than
  photographs usually are.

A soft photo gains from sharpening, a crisp one from none.
"""

from __future__ import annotations

import numpy as np

from rewards.comparison import Comparison, compare
from rewards.guard import guard
from rewards.naturalness import focus_fault, restraint_fault

NATURAL = 0.043  # detail of a crisp photo
HALO = 0.012  # share of the range: 0.004 for first ringing at edges, 0.01 for visible ringing
EXCESS = 0.08


def sharpness(source: np.ndarray, candidates: list[np.ndarray]) -> list[float | None]:
    """Score candidates (uint8 RGB) from 0 to 1, independent of the group; the module's docstring has the formula."""
    return [float(score_comparison(comparison)) for comparison in compare(source, candidates)]


def score_comparison(comparison: Comparison) -> float:
    """Score one candidate, 0..1."""
    fault = focus_fault(comparison.measures) + restraint_fault(comparison) + sharpening_fault(comparison)
    return guard(comparison) * np.exp(-fault)


def sharpening_fault(comparison: Comparison) -> float:
    """Return the fault of too much sharpening: halos, and more detail than photos have."""
    natural = np.maximum(comparison.photo.measures.detail, NATURAL)
    excess = np.maximum(0, np.log(np.maximum(comparison.measures.detail, 1e-4) / natural)) / 0.3
    return (comparison.halo / HALO) ** 2 + EXCESS * excess
