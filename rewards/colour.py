"""The reward `colour`: rich and clean colours that stay true to the photo.

    colour = guard * exp(-colour - restraint)

The guard is `guard.guard`; colour and restraint are in `naturalness`: an optimum of the mean chroma between dull and
neon, casts of the greys and of the lights, and hue shifts. A dull photo gains from moderate saturation, a neon one from
less, one with a cast from the opposite warmth, and a vivid clean one from nothing.
"""

from __future__ import annotations

import numpy as np

from rewards.comparison import Comparison, compare
from rewards.guard import guard
from rewards.naturalness import colour_fault, restraint_fault


def colour(source: np.ndarray, candidates: list[np.ndarray]) -> list[float | None]:
    """Score candidates (uint8 RGB) from 0 to 1, independent of the group; the module's docstring has the formula."""
    return [float(score_comparison(comparison)) for comparison in compare(source, candidates)]


def score_comparison(comparison: Comparison) -> float:
    """Score one candidate, 0..1."""
    fault = colour_fault(comparison.measures, comparison.photo) + restraint_fault(comparison)
    return guard(comparison) * np.exp(-fault)
