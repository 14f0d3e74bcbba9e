"""The reward `sharpness`: how crisp the picture is, without halos, noise or burnt-out areas."""

from __future__ import annotations

import cv2
import numpy as np

from rewards import compare

HALF = 0.040  # gradient (of sRGB-coded luminance per pixel, root mean square) that scores one half
NOISE_GAIN = 0.2
_NOISE = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)


def sharpness(source: np.ndarray, candidates: list[np.ndarray]) -> list[float | None]:
    """First version; see the definition in the module's constants."""
    return [_one(compare.pair(source, picture)) for picture in candidates]


def _one(pair: compare.Pair) -> float:
    grey = cv2.cvtColor(pair.picture, cv2.COLOR_RGB2GRAY)
    crisp = gradient(grey) / HALF
    crisp = crisp**2 / (1 + crisp**2)
    burnt = max(0.0, compare.clipped(pair.picture) - compare.clipped(pair.source))
    halo = halos(cv2.cvtColor(pair.source, cv2.COLOR_RGB2GRAY), grey)
    gate = np.exp(-((compare.fidelity(pair.source, pair.picture) / 25) ** 2))
    return float(crisp * np.exp(-burnt / 0.1 - halo / 0.02) * gate * pair.area**0.25)


def gradient(grey: np.ndarray) -> float:
    """Root mean square gradient of a uint8 luminance, per pixel in units of its range, without the share of white noise.

    Gaussian smoothing (sigma 0.8), Sobel; the noise is estimated in the flattest blocks with the mask of Immerkaer (1996).
    """
    smooth = cv2.GaussianBlur(cv2.convertScaleAbs(grey).astype(np.int16) * 16, (0, 0), 0.8)
    energy = sum(cv2.norm(cv2.Sobel(smooth, cv2.CV_16S, *way), cv2.NORM_L2SQR) for way in ((1, 0), (0, 1)))
    per_pixel = energy / grey.size / (8 * 16 * 255) ** 2
    return float(np.sqrt(max(0.0, per_pixel - NOISE_GAIN * noise(grey) ** 2)))


def noise(grey: np.ndarray) -> float:
    """Standard deviation of white noise in a uint8 luminance, in units of its range."""
    mask = cv2.convertScaleAbs(cv2.filter2D(grey, cv2.CV_16S, _NOISE))
    blocks = cv2.resize(mask, (24, 24), interpolation=cv2.INTER_AREA)
    return float(np.percentile(blocks, 20)) * np.sqrt(np.pi / 2) / 6 / 255


def halos(source: np.ndarray, grey: np.ndarray) -> float:
    """Mean overshoot of a luminance beyond the local extremes of its source (both uint8), after the source's tones were
    mapped to the candidate's: 0 without, about 0.01 where edges ring visibly."""
    counts = np.bincount(source[::2, ::2].ravel(), minlength=256)
    sums = np.bincount(source[::2, ::2].ravel(), grey[::2, ::2].ravel(), minlength=256)
    known = np.flatnonzero(counts)
    tones = np.interp(np.arange(256), known, sums[known] / counts[known])
    tones = np.maximum.accumulate(tones).round().astype(np.uint8)
    kernel = np.ones((5, 5), np.uint8)
    over = cv2.subtract(grey, cv2.LUT(cv2.dilate(source, kernel), tones))
    under = cv2.subtract(cv2.LUT(cv2.erode(source, kernel), tones), grey)
    return float(cv2.mean(cv2.add(over, under))[0]) / 255
