"""The reward `sharpness`: how crisp the picture is, without halos, noise or burnt-out areas."""

from __future__ import annotations

import cv2
import numpy as np

from rewards import compare

HALF = 0.040  # gradient (of sRGB-coded luminance per pixel, root mean square) that scores one half
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
    """Root mean square gradient of a uint8 luminance after slight smoothing, with the share of white noise taken out."""
    values = grey.astype(np.float32) / 255
    smooth = cv2.GaussianBlur(values, (0, 0), 0.8)
    gx, gy = cv2.Sobel(smooth, cv2.CV_32F, 1, 0, scale=1 / 8), cv2.Sobel(smooth, cv2.CV_32F, 0, 1, scale=1 / 8)
    energy = float((gx * gx + gy * gy).mean())
    noise = cv2.filter2D(values, cv2.CV_32F, _NOISE)
    blocks = cv2.resize(noise * noise, (24, 24), interpolation=cv2.INTER_AREA) / 36
    return float(np.sqrt(max(0.0, energy - 0.2 * np.percentile(blocks, 20))))


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
