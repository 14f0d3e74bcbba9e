"""Naturalness: how far tones, colours and detail of a picture are from those of pictures that people keep.

Each function returns a fault, 0 or more; a reward contains the factor exp(-fault). With up(x) = max(x, 0):

    tone = BLACK up((black point - 15) / 10)^1.5 + WHITE up((95 - white point) / 10)^1.5     lifted blacks, grey whites
         + LIGHT ((L - 48) / 12)^2 + FLAT up((28 - contrast) / 6)^2 + HARSH up((contrast - 31) / 6)^2
         + WHITES white / 0.1 + BLACKS black / 0.1 + SATURATED saturated / 0.3                blown and crushed ends
    burn = NEW_WHITES up(white - white of the photo) / 0.1 + NEW_BLACKS up(black - black of the photo) / 0.1
         + NEW_CLIPPED up(saturated - saturated of the photo - 0.15) / 0.3                channels that the edit clipped
    colour = NEON up((chroma - 43) / 10)^2 + DULL up((15 - spread) / 8)^2
           + CAST (min(cast of the greys, 14) / 10)^2 + LIGHT_CAST (min(cast of the lights, 28) / 20)^2
           + NEW_CAST up((cast of the greys - that of the photo) / 10)^2
           + BOOST up(ln(chroma / (1.6 chroma of the photo)) / 0.3)^2
    fading = PALE up(ln(min(spread of the photo, 30) / (1.2 spread)) / 0.3)^2                lost colours
    focus = ln(1 + (HALF / detail)^POWER)
    restraint = KEEP (CHANGE change / 8 + HUE hue shift / 20)
    KEEP = exp(-HEAL (tone + colour + focus of the photo) - CLEAN removed (spread / spread of the photo, at most 1)^4)
    removed = up(cast of the greys of the photo - cast) / 10 + up(cast of the lights of the photo - cast) / 20

The measures are those of `measures.Measures`; change is the mean CIEDE2000 to the photo. All optima lie inside the
range of photographs, so that a dull photo gains from what ruins a good one. The better a photo is, the less it should
be changed; a change that removes a cast and keeps the other colours is nearly free. A photo without colours does not
need any: DULL fades out below a spread of the photo of 3.

The weights are fitted on judged pairs of edits by `bench.fit_rewards`. Those of the casts and of what an edit adds
(NEW_), PALE and HEAL were set higher afterwards, against pictures that `bench.adversaries` produced and for photos with
a strong cast, which are rare among the pairs.
"""

from __future__ import annotations

import numpy as np

from rewards.comparison import Comparison, PhotoProfile
from rewards.measures import Measures

BLACK_POINT, BLACK = 15.0, 0.19
WHITE_POINT, WHITE = 95.0, 0.2
LIGHTNESS, LIGHT = 48.0, 0.013
FLAT_BELOW, FLAT = 28.0, 0.16
HARSH_ABOVE, HARSH = 31.0, 0.05
WHITES, BLACKS, SATURATED = 0.041, 0.013, 0.02
NEW_WHITES, NEW_BLACKS, NEW_CLIPPED, SPARE = 0.28, 0.25, 0.6, 0.15
NEON_ABOVE, NEON = 43.0, 0.26
DULL_BELOW, DULL = 15.0, 0.62
COLOURLESS, COLOURED = 1.5, 3.0  # spread of a photo's colours between which DULL fades in
CAST, LIGHT_CAST, NEW_CAST = 0.05, 0.12, 0.5
MAX_CAST = 14.0  # of the greys, twice that of the lights: a stronger cast is the light of the scene
BOOST, MAX_BOOST, BOOST_UNIT = 0.2, 1.6, 0.3
PALE, MAX_LOSS, VIVID = 0.08, 1.2, 30.0  # colours may be lost down to VIVID, but no further
HALF, POWER = 0.02, 3.0
CHANGE, HUE, HEAL, CLEAN = 0.35, 0.27, 0.3, 1.5


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


def burn_fault(comparison: Comparison) -> float:
    """Return the fault of tones that an edit burnt out: white or black where the photo was not."""
    after, before = comparison.measures, comparison.photo.measures
    new_whites, new_blacks = _above(after.white, before.white, 0.1), _above(after.black, before.black, 0.1)
    new_clipped = _above(after.saturated, before.saturated + SPARE, 0.3)
    return NEW_WHITES * new_whites + NEW_BLACKS * new_blacks + NEW_CLIPPED * new_clipped


def colour_fault(measures: Measures, photo: PhotoProfile) -> float:
    """Return the fault of a picture's colours: neon, dull where the photo has colours, or with a cast."""
    coloured = np.clip((photo.measures.colour_spread - COLOURLESS) / (COLOURED - COLOURLESS), 0, 1)
    boost = np.log((measures.chroma + 1) / (photo.measures.chroma + 1))
    return (
        NEON * _above(measures.chroma, NEON_ABOVE, 10) ** 2
        + DULL * coloured * _above(DULL_BELOW, measures.colour_spread, 8) ** 2
        + CAST * (np.minimum(measures.neutral_cast, MAX_CAST) / 10) ** 2
        + LIGHT_CAST * (np.minimum(measures.light_cast, 2 * MAX_CAST) / 20) ** 2
        + NEW_CAST * _above(measures.neutral_cast, photo.measures.neutral_cast, 10) ** 2
        + BOOST * _above(boost, np.log(MAX_BOOST), BOOST_UNIT) ** 2
    )


def fading_fault(comparison: Comparison) -> float:
    """Return the fault of colours that an edit took away."""
    after, before = comparison.measures.colour_spread, comparison.photo.measures.colour_spread
    loss = np.log((np.minimum(before, VIVID) + 1) / (after + 1))
    return PALE * _above(loss, np.log(MAX_LOSS), BOOST_UNIT) ** 2


def focus_fault(measures: Measures) -> float:
    """Return the fault of a picture's detail: blurred."""
    return np.log1p((HALF / np.maximum(measures.detail, 1e-4)) ** POWER)


def restraint_fault(comparison: Comparison) -> float:
    """Return the fault of a change that the photo did not need."""
    photo = comparison.photo
    need = tone_fault(photo.measures) + colour_fault(photo.measures, photo) + focus_fault(photo.measures)
    before, after = photo.measures, comparison.measures
    removed = _above(before.neutral_cast, after.neutral_cast, 10) + _above(before.light_cast, after.light_cast, 20)
    kept = np.minimum(1, (after.colour_spread + 1) / (before.colour_spread + 1)) ** 4  # 0 where all colours go
    return np.exp(-HEAL * need - CLEAN * removed * kept) * (
        CHANGE * comparison.change / 8 + HUE * comparison.hue_shift / 20
    )


def _above(value: float, limit: float, unit: float) -> float:
    """Return how far a value exceeds a limit, in units; 0 if it does not."""
    return np.maximum(0, (value - limit) / unit)
