"""Focus measures: detail, noise and halos of a luminance."""

from __future__ import annotations

import cv2
import numpy as np

NOISE_GAIN = (
    0.8  # twice the gain of white noise through smoothing and Laplacian (0.41), so that noise never counts as detail
)
_SMOOTH = np.array([1, 2, 1], np.float32)  # binomial, close to a Gaussian of sigma 0.7
_NOISE = np.array([1, -2, 1], np.float32)  # its outer product with itself is Immerkaer's mask


def detail(grey: np.ndarray) -> float:
    """Return the root mean square Laplacian of a smoothed uint8 luminance, less white noise, as a share of its range.

    A tenth of the gradient at a quarter of the size is added, so that heavily blurred pictures are still ordered.
    """
    smooth = cv2.copyMakeBorder(cv2.sepFilter2D(grey, cv2.CV_16S, _SMOOTH, _SMOOTH), 1, 1, 1, 1, cv2.BORDER_REPLICATE)
    neighbours = smooth[:-2, 1:-1] + smooth[2:, 1:-1] + smooth[1:-1, :-2] + smooth[1:-1, 2:]
    fine = _energy(neighbours - 4 * smooth[1:-1, 1:-1], 16)
    quarter = _blocks(grey, 4)
    coarse = sum(_energy(cv2.Sobel(quarter, cv2.CV_16S, *axis), 8) for axis in ((1, 0), (0, 1)))
    return float(np.sqrt(max(fine - NOISE_GAIN * noise(grey) ** 2, 0.0) + 0.01 * coarse))


def _energy(values: np.ndarray, scale: float) -> float:
    """Return the mean square of int16 values, in units of `scale` times the range of a picture."""
    return cv2.norm(values, cv2.NORM_L2SQR) / values.size / (scale * 255) ** 2


def noise(grey: np.ndarray) -> float:
    """Estimate the standard deviation of the noise in a uint8 luminance, as a share of its range.

    The 30th percentile of the root mean square of Immerkaer's mask over 16 x 16 blocks neither black nor white.
    """
    mask = cv2.sepFilter2D(grey, cv2.CV_16S, _NOISE, _NOISE).astype(np.float32)
    energy, light = _blocks(mask * mask, 16), _blocks(grey, 16)
    inside = energy[(light > 12) & (light < 243)]
    blocks = np.sort(inside if len(inside) >= 8 else energy, axis=None)
    return float(np.sqrt(blocks[int(0.3 * len(blocks))]) / 6 / 255)


def _blocks(values: np.ndarray, size: int) -> np.ndarray:
    """Return the means of blocks of size x size; incomplete blocks at the right and the bottom are dropped."""
    rows, columns = (max(1, side // size) for side in values.shape)
    return cv2.resize(values[: rows * size, : columns * size], (columns, rows), interpolation=cv2.INTER_AREA)


def halo_strength(source: np.ndarray, grey: np.ndarray) -> float:
    """Return the mean overshoot of a uint8 luminance beyond the local extremes (5 x 5) of its source.

    The source's tones are mapped to the candidate's first, so that exposure and contrast do not count as overshoot.

    Returns:
        A share of the luminance's range: 0 without halos, 0.004 for first ringing at edges, 0.01 for visible ringing.
    """
    tones, kernel = _tone_curve(source, grey), np.ones((5, 5), np.uint8)
    over = cv2.subtract(grey, cv2.LUT(cv2.dilate(source, kernel), tones))
    under = cv2.subtract(cv2.LUT(cv2.erode(source, kernel), tones), grey)
    return float(cv2.mean(cv2.add(over, under))[0]) / 255


def _tone_curve(source: np.ndarray, grey: np.ndarray) -> np.ndarray:
    """Return a lookup table uint8 [256] from the source's tones to the candidate's.

    The means of both over 32 ranges of the source's tones, at an eighth of the size, where neither blur nor sharpening
    shows; extrapolated linearly at both ends.
    """
    before, after = _blocks(source, 8).ravel(), _blocks(grey, 8).ravel()
    counts = np.bincount(before >> 3, minlength=32)
    used = counts > 0
    x, y = (np.bincount(before >> 3, values, minlength=32)[used] / counts[used] for values in (before, after))
    reach = 256 * after.std() / max(before.std(), 1.0)
    curve = np.interp(np.arange(256), [x[0] - 256, *x, x[-1] + 256], [y[0] - reach, *y, y[-1] + reach])
    return np.clip(np.maximum.accumulate(curve), 0, 255).round().astype(np.uint8)
