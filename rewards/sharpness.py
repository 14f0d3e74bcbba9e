"""The reward `sharpness`: how crisp the picture is, on an absolute scale, as long as nothing was overdone.

    sharpness = d^4 / (d^4 + HALF^4) * exp(-over - halo - burnt - change - cut)

- d, the detail: root mean square of the Laplacian of the slightly smoothed luminance, a focus measure (Pertuz, Puig and
  Garcia, "Analysis of focus measure operators for shape-from-focus", 2013), without the white noise that the flattest
  blocks show (Immerkaer, "Fast noise variance estimation", 1996). The first factor rises with it.
- over = (ln(d / max(d of the source, NATURAL)) / OVER)^2 / 2 if positive: crisper than photos are and this one was.
- halo = (mean overshoot beyond the local extremes of the source, at its tones / HALO)^2.
- burnt = new share of pixels that lost their tone / BURNT.
- change = (mean CIEDE2000 to the source / CHANGE)^2, so that black and white or a colour cast are no way to win.
- cut = -CUT ln(share of the area that was kept).

So a soft photo gains from as much sharpening as it lacks, a crisp one from none, and a flat one from contrast.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from rewards import image_metrics as compare

HALF = 0.03  # the detail that scores one half, in units of the luminance's range
NATURAL = 0.043  # the detail of a crisp photo
OVER = 0.3
HALO = 0.012
BURNT = 0.4
CHANGE = 40.0
CUT = 0.15

NOISE_GAIN = 0.8  # of white noise through smoothing and Laplacian: 0.41; twice that, so that no noise is ever detail
_SMOOTH = np.array([1, 2, 1], np.float32)  # binomial, like a Gaussian of sigma 0.7
_NOISE = np.array([1, -2, 1], np.float32)  # Immerkaer's mask is the outer product of this with itself


@dataclass(frozen=True)
class _View:
    """What is measured once for a part of the source."""

    grey: np.ndarray
    detail: float
    toneless: float


def sharpness(source: np.ndarray, candidates: list[np.ndarray]) -> list[float | None]:
    """Scores 0..1 of candidates (uint8 RGB), each by itself; the module says how."""
    views: dict[tuple[float, ...], _View] = {}
    scores: list[float | None] = []
    for picture in candidates:
        pair = compare.pair(source, picture)
        if pair.box not in views:
            views[pair.box] = _view(pair.source)
        scores.append(_score(pair, views[pair.box]))
    return scores


def _view(picture: np.ndarray) -> _View:
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    return _View(grey, detail(grey), toneless(grey))


def _score(pair: compare.Pair, source: _View) -> float:
    picture = _view(pair.picture)
    crisp = (picture.detail / HALF) ** 4
    over = np.log(max(picture.detail / max(source.detail, NATURAL), 1.0)) / OVER
    halo = halos(source.grey, picture.grey) / HALO
    burnt = max(0.0, picture.toneless - source.toneless) / BURNT
    change = compare.fidelity(pair.source, pair.picture) / CHANGE
    penalty = over**2 / 2 + halo**2 + burnt + change**2 - CUT * np.log(pair.area)
    return float(crisp / (1 + crisp) * np.exp(-penalty))


def detail(grey: np.ndarray) -> float:
    """Root mean square Laplacian of a smoothed uint8 luminance, white noise taken out, in units of its range.

    A tenth of the gradient at a quarter of the size is added, so that a heavily blurred picture still has an order.
    """
    smooth = cv2.copyMakeBorder(cv2.sepFilter2D(grey, cv2.CV_16S, _SMOOTH, _SMOOTH), 1, 1, 1, 1, cv2.BORDER_REPLICATE)
    around = smooth[:-2, 1:-1] + smooth[2:, 1:-1] + smooth[1:-1, :-2] + smooth[1:-1, 2:]
    fine = _energy(around - 4 * smooth[1:-1, 1:-1], 16)
    quarter = _blocks(grey, 4)
    coarse = sum(_energy(cv2.Sobel(quarter, cv2.CV_16S, *way), 8) for way in ((1, 0), (0, 1)))
    return float(np.sqrt(max(fine - NOISE_GAIN * noise(grey) ** 2, 0.0) + 0.01 * coarse))


def _energy(values: np.ndarray, scale: float) -> float:
    """Mean square of int16 values, in units of `scale` times the range of a picture."""
    return cv2.norm(values, cv2.NORM_L2SQR) / values.size / (scale * 255) ** 2


def noise(grey: np.ndarray) -> float:
    """Standard deviation of the noise in a uint8 luminance, in units of its range.

    Immerkaer's mask, root mean square over blocks of 16 x 16 that are neither black nor white: the 30th percentile.
    """
    mask = cv2.sepFilter2D(grey, cv2.CV_16S, _NOISE, _NOISE).astype(np.float32)
    energy, light = _blocks(mask * mask, 16), _blocks(grey, 16)
    inside = energy[(light > 12) & (light < 243)]
    blocks = np.sort(inside if len(inside) >= 8 else energy, axis=None)
    return float(np.sqrt(blocks[int(0.3 * len(blocks))]) / 6 / 255)


def _blocks(values: np.ndarray, size: int) -> np.ndarray:
    """Means of blocks of size x size; what is left over at the right and at the bottom does not count."""
    rows, columns = (max(1, side // size) for side in values.shape)
    return cv2.resize(values[: rows * size, : columns * size], (columns, rows), interpolation=cv2.INTER_AREA)


def toneless(grey: np.ndarray) -> float:
    """The share of a uint8 luminance that is black or white."""
    return 1 - cv2.countNonZero(cv2.inRange(grey, 3, 252)) / grey.size


def halos(source: np.ndarray, grey: np.ndarray) -> float:
    """Mean overshoot of a uint8 luminance beyond the local extremes (5 x 5) of its source, in units of its range.

    The source's tones are mapped to the candidate's first, so that exposure and contrast are no overshoot. 0 without,
    0.004 where edges begin to ring, 0.01 where they ring visibly.
    """
    tones, kernel = _tones(source, grey), np.ones((5, 5), np.uint8)
    over = cv2.subtract(grey, cv2.LUT(cv2.dilate(source, kernel), tones))
    under = cv2.subtract(cv2.LUT(cv2.erode(source, kernel), tones), grey)
    return float(cv2.mean(cv2.add(over, under))[0]) / 255


def _tones(source: np.ndarray, grey: np.ndarray) -> np.ndarray:
    """A table uint8 [256] from the source's tones to the candidate's: means of both over 32 ranges of the source's,
    on versions of an eighth of the size, where neither blur nor sharpening shows; straight on at both ends."""
    few, many = _blocks(source, 8).ravel(), _blocks(grey, 8).ravel()
    counts = np.bincount(few >> 3, minlength=32)
    known = counts > 0
    x, y = (np.bincount(few >> 3, values, minlength=32)[known] / counts[known] for values in (few, many))
    reach = 256 * many.std() / max(few.std(), 1.0)
    curve = np.interp(np.arange(256), [x[0] - 256, *x, x[-1] + 256], [y[0] - reach, *y, y[-1] + reach])
    return np.clip(np.maximum.accumulate(curve), 0, 255).round().astype(np.uint8)
