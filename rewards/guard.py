"""The guard: what every reward, and so every total, contains.

    guard = exp(-framing - tone - burn - fading - border - broken)

    framing = LOST subject_lost + CUT subject_cut + HEAD (0.5 + head_lost, if any head is cut)
            + AREA (1 - kept) + ASPECT |ln(change of width / height)|
    border = BORDER border / 0.2
    broken = BROKEN max(0, 0.8 - structure) / 0.2

`tone`, `burn` and `fading` are in `naturalness`, the measures of the crop in `subject.Framing`. A crop that removes
only a border costs nothing, because the content of the photo is what is measured. `broken` is about 0 for every recipe;
it punishes noise and shuffled pixels. The weights are fitted by `bench.fit_rewards`; LOST and HEAD were set higher,
because cut faces are rare among the pairs.
"""

from __future__ import annotations

import numpy as np

from rewards.comparison import Comparison
from rewards.naturalness import burn_fault, fading_fault, tone_fault
from rewards.subject import Framing

LOST, CUT, HEAD, AREA, ASPECT = 0.8, 0.16, 0.35, 0.62, 1.2
BORDER, BORDER_UNIT, MAX_BORDER = 2.0, 0.2, 2.0
BROKEN = 0.8
HEAD_TOLERANCE = 0.05  # share of a head's box that may be outside


def guard(comparison: Comparison) -> float:
    """Return 1 for a whole subject in natural tones, towards 0 for a cut subject, a border or ruined tones."""
    border = BORDER * np.minimum(comparison.border / BORDER_UNIT, MAX_BORDER)
    broken = BROKEN * np.maximum(0, 0.8 - comparison.structure) / 0.2
    tone = tone_fault(comparison.measures) + burn_fault(comparison) + fading_fault(comparison)
    return np.exp(-framing_fault(comparison.framing) - tone - border - broken)


def framing_fault(framing: Framing) -> float:
    """Return the fault of a crop, 0 for the whole photo."""
    head = HEAD * (0.5 + framing.head_lost) * (framing.head_lost > HEAD_TOLERANCE)
    return (
        LOST * framing.subject_lost
        + CUT * framing.subject_cut
        + head
        + AREA * (1 - framing.kept)
        + ASPECT * framing.aspect
    )
