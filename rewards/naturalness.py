"""Naturalness: how far tones, colours and detail of a picture are from those of pictures that people keep.

Each function returns a fault, 0 or more; a reward contains the factor exp(-fault). With up(x) = max(x, 0):

    tone = BLACK up((black point - 15) / 10)^1.5 + WHITE up((95 - white point) / 10)^1.5      lifted blacks, grey whites
         + LIGHT ((L - 48) / 12)^2 + FLAT up((28 - contrast) / 6)^2 + HARSH up((contrast - 30) / 6)^2
         + WHITES white / 0.1 + BLACKS black / 0.1 + SATURATED saturated / 0.3                 blown and crushed ends
    colour = NEON up((chroma - 43) / 10)^2 + DULL up((19 - chroma) / 8)^2
         + CAST (cast of the greys / 10)^2 + LIGHT_CAST (cast of the lights / 20)^2
    focus = ln(1 + (HALF / detail)^POWER) + VEIL up((9 - clarity) / 4)^2
    restraint = KEEP (CHANGE change / 8 + HUE hue shift / 20),  KEEP = exp(-HEAL (tone + colour + focus of the photo))

The measures are those of `measures.Measures`; change is the mean CIEDE2000 to the photo. All optima lie inside the range
of photographs, so that a dull photo gains from what ruins a good one, and the better a photo is, the less it should be
changed. A photo without colours is not asked for any: DULL fades out below a chroma of the photo of 3.5. Constants: fitted
to judged pairs of edits, see docs/rewards.md.
"""

from __future__ import annotations

import math

from rewards.comparison import Comparison, PhotoProfile
from rewards.measures import Measures

BLACK_POINT, BLACK = 15.0, 0.07
WHITE_POINT, WHITE = 95.0, 0.15
LIGHTNESS, LIGHT = 48.0, 0.01
FLAT_BELOW, FLAT = 28.0, 0.065
HARSH_ABOVE, HARSH = 30.0, 0.022
WHITES, BLACKS, SATURATED = 0.09, 0.013, 0.25
NEON_ABOVE, NEON = 43.0, 0.13
DULL_BELOW, DULL = 19.0, 0.2
CAST, LIGHT_CAST = 0.023, 0.027
COLOURLESS, COLOURED = 1.5, 3.5  # chroma of a photo between which DULL fades in
HALF, POWER = 0.016, 2.6
VEIL_BELOW, VEIL = 9.0, 0.3
CHANGE, HUE, HEAL = 0.28, 0.17, 0.6


def tone_fault(measures: Measures) -> float:
    """Return the fault of a picture's tones: veiled, grey, too dark or light, flat, harsh, blown or crushed."""
    return (
        BLACK * _above(measures.black_point, BLACK_POINT, 10) ** 1.5
        + WHITE * _above(WHITE_POINT, measures.white_point, 10) ** 1.5
        + LIGHT * ((measures.light - LIGHTNESS) / 12) ** 2
        + FLAT * _above(FLAT_BELOW, measures.contrast, 6) ** 2
        + HARSH * _above(measures.contrast, HARSH_ABOVE, 6) ** 2
        + WHITES * measures.white / 0.1
        + BLACKS * measures.black / 0.1
        + SATURATED * measures.saturated / 0.3
    )


def colour_fault(measures: Measures, photo: PhotoProfile) -> float:
    """Return the fault of a picture's colours: neon, dull where the photo has colours, or with a cast."""
    coloured = min(1.0, max(0.0, (photo.measures.chroma - COLOURLESS) / (COLOURED - COLOURLESS)))
    return (
        NEON * _above(measures.chroma, NEON_ABOVE, 10) ** 2
        + DULL * coloured * _above(DULL_BELOW, measures.chroma, 8) ** 2
        + CAST * (measures.neutral_cast / 10) ** 2
        + LIGHT_CAST * (measures.light_cast / 20) ** 2
    )


def focus_fault(measures: Measures) -> float:
    """Return the fault of a picture's detail: blurred or veiled."""
    blur = math.log1p((HALF / max(measures.detail, 1e-4)) ** POWER)
    return blur + VEIL * _above(VEIL_BELOW, measures.clarity, 4) ** 2


def restraint_fault(comparison: Comparison) -> float:
    """Return the fault of a change that the photo did not need."""
    photo = comparison.photo
    need = tone_fault(photo.measures) + colour_fault(photo.measures, photo) + focus_fault(photo.measures)
    return math.exp(-HEAL * need) * (CHANGE * comparison.change / 8 + HUE * comparison.hue_shift / 20)


def _above(value: float, limit: float, unit: float) -> float:
    """Return how far a value exceeds a limit, in units; 0 if it does not."""
    return max(0.0, (value - limit) / unit)
