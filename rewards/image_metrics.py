"""Image metrics shared by the rewards: alignment of a crop, colour difference, clipping and structural similarity."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

SMALL_SIDE = 64  # px: long side at which colours and structure are compared
_COARSE, _SAMPLE = 8, 4  # a crop is located at 1/8 of the size first, then refined on every fourth pixel


@dataclass(frozen=True)
class AlignedPair:
    """A candidate and the part of the source that it shows.

    Attributes:
        source: The part of the source, uint8 RGB of the picture's size.
        picture: The candidate, uint8 RGB.
        area: Share of the source's area that is shown, 0..1.
        box: Left, top, right, bottom of that part, 0..1 of the source.
    """

    source: np.ndarray
    picture: np.ndarray
    area: float
    box: tuple[float, float, float, float]


def align(source: np.ndarray, picture: np.ndarray) -> AlignedPair:
    """Locate a candidate in its source by the correlation of their luminance.

    Args:
        source: uint8 [H, W, 3] RGB.
        picture: uint8 [h, w, 3] RGB. A candidate of the source's size is not searched for; a candidate that is larger
            in any direction is resized to the source's size.
    """
    (height, width), (h, w) = source.shape[:2], picture.shape[:2]
    if (h, w) == (height, width):
        return AlignedPair(source, picture, 1.0, (0.0, 0.0, 1.0, 1.0))
    if h > height or w > width:
        resized = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
        return AlignedPair(source, resized, 1.0, (0.0, 0.0, 1.0, 1.0))
    x, y = _locate(cv2.cvtColor(source, cv2.COLOR_RGB2GRAY), cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY))
    box = (x / width, y / height, (x + w) / width, (y + h) / height)
    return AlignedPair(source[y : y + h, x : x + w], picture, (h * w) / (height * width), box)


def _locate(source: np.ndarray, part: np.ndarray) -> tuple[int, int]:
    """Return left and top of a part in its source (both uint8 grey).

    The best correlation at 1/8 of the size is refined to the best nearby position at which a recipe can crop, which is
    exact for a rendered recipe.
    """
    x, y = (_COARSE * offset for offset in _match(_shrink(source, _COARSE), _shrink(part, _COARSE)))
    (height, width), (h, w) = source.shape, part.shape
    positions = [(left, top) for top in _crop_starts(y, height, h) for left in _crop_starts(x, width, w)]
    if len(positions) == 1:
        return positions[0]
    sample = _centred(part[::_SAMPLE, ::_SAMPLE])

    def correlation(position: tuple[int, int]) -> float:
        left, top = position
        view = _centred(source[top : top + h : _SAMPLE, left : left + w : _SAMPLE])
        return float(np.vdot(sample, view) / np.sqrt(np.vdot(view, view) + 1))

    return max(positions, key=correlation)


def _centred(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float32)
    return values - values.mean()


def _crop_starts(start: int, length: int, part: int) -> list[int]:
    """Return the offsets near `start` at which a crop in whole percents is `part` pixels long, else `start` itself."""
    ends = {-(-length * high // 100) for high in range(60, 101)}
    starts = {length * low // 100 for low in range(41)}
    near = sorted(offset for offset in starts if offset + part in ends and abs(offset - start) <= 1.5 * _COARSE)
    return near or [min(max(start, 0), length - part)]


def _shrink(grey: np.ndarray, scale: int) -> np.ndarray:
    size = max(1, round(grey.shape[1] / scale)), max(1, round(grey.shape[0] / scale))
    return cv2.resize(grey, size, interpolation=cv2.INTER_AREA)


def _match(image: np.ndarray, part: np.ndarray) -> tuple[int, int]:
    if part.shape[0] > image.shape[0] or part.shape[1] > image.shape[1]:
        return 0, 0
    scores = np.nan_to_num(cv2.matchTemplate(image, part, cv2.TM_CCOEFF_NORMED), nan=-1.0, posinf=-1.0, neginf=-1.0)
    y, x = np.unravel_index(int(np.argmax(scores)), scores.shape)
    return int(x), int(y)


def downscale(picture: np.ndarray, limit: int = SMALL_SIDE) -> np.ndarray:
    """Halve a picture (uint8 [H, W, 3]) until its long side is at most `limit`; returns float32 sRGB 0..1."""
    while max(picture.shape[:2]) > limit:
        size = max(1, picture.shape[1] // 2), max(1, picture.shape[0] // 2)
        even = picture[: 2 * size[1], : 2 * size[0]]  # exact halves are OpenCV's fast case
        picture = cv2.resize(even, size, interpolation=cv2.INTER_AREA)
    return picture.astype(np.float32) / 255


def to_lab(picture: np.ndarray) -> np.ndarray:
    """Convert float32 sRGB 0..1 [H, W, 3] to CIELAB (D65): L* 0..100, a* and b* about -100..100."""
    return cv2.cvtColor(picture, cv2.COLOR_RGB2LAB)


def clipped_share(picture: np.ndarray) -> float:
    """Return the share of pixels of a uint8 picture with a clipped channel (<= 1 or >= 254), on every fourth row."""
    inside = cv2.inRange(picture[::4], (2, 2, 2), (253, 253, 253))
    return 1.0 - cv2.countNonZero(inside) / inside.size


def fidelity(source: np.ndarray, picture: np.ndarray) -> float:
    """Return the mean CIEDE2000 of two aligned uint8 pictures, downscaled; 2.3 is just noticeable."""
    return mean_ciede2000(to_lab(downscale(source)), to_lab(downscale(picture)))


def mean_ciede2000(first: np.ndarray, second: np.ndarray) -> float:
    """Return the mean CIEDE2000 of two CIELAB arrays [H, W, 3], on every second pixel of every second row."""
    return float(ciede2000(first[::2, ::2], second[::2, ::2]).mean())


def ciede2000(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the colour difference [...] of two CIELAB arrays [..., 3].

    Sharma, Wu and Dalal (2005), with kL = kC = kH = 1.
    """
    (l1, a1, b1), (l2, a2, b2) = np.moveaxis(first, -1, 0), np.moveaxis(second, -1, 0)
    mean7 = _power7((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2)
    stretch = 1.5 - 0.5 * np.sqrt(mean7 / (mean7 + 25.0**7))
    a1, a2 = a1 * stretch, a2 * stretch
    c1, c2 = np.hypot(a1, b1), np.hypot(a2, b2)
    h1, h2 = np.arctan2(b1, a1), np.arctan2(b2, a2)
    turn = np.where(c1 * c2 > 0, (h2 - h1 + np.pi) % (2 * np.pi) - np.pi, 0.0)
    hue = np.where(c1 * c2 > 0, h1 + turn / 2, h1 + h2)
    light, chroma = (l1 + l2) / 2, (c1 + c2) / 2
    t = 1 - 0.17 * np.cos(hue - np.pi / 6) + 0.24 * np.cos(2 * hue)
    t += 0.32 * np.cos(3 * hue + np.pi / 30) - 0.20 * np.cos(4 * hue - 63 * np.pi / 180)
    s_l = 1 + 0.015 * (light - 50) ** 2 / np.sqrt(20 + (light - 50) ** 2)
    s_c, s_h = 1 + 0.045 * chroma, 1 + 0.015 * chroma * t
    degrees = np.degrees(hue) % 360
    chroma7 = _power7(chroma)
    rotation = (
        -2 * np.sqrt(chroma7 / (chroma7 + 25.0**7)) * np.sin(np.radians(60 * np.exp(-(((degrees - 275) / 25) ** 2))))
    )
    d_l, d_c = (l2 - l1) / s_l, (c2 - c1) / s_c
    d_h = 2 * np.sqrt(c1 * c2) * np.sin(turn / 2) / s_h
    return np.sqrt(np.maximum(d_l**2 + d_c**2 + d_h**2 + rotation * d_c * d_h, 0))


def _power7(values: np.ndarray) -> np.ndarray:
    cubes = values * values * values
    return cubes * cubes * values


def colourfulness(picture: np.ndarray) -> float:
    """Return M of Hasler and Suesstrunk for float32 sRGB 0..1: spread + 0.3 mean of R - G and (R + G) / 2 - B."""
    opponents = cv2.transform(picture, np.array([[1, -1, 0], [0.5, 0.5, -1]], np.float32))
    mean, spread = cv2.meanStdDev(opponents)
    return float(255 * (np.hypot(*spread[:, 0]) + 0.3 * np.hypot(*mean[:, 0])))


def hue_shift(first: np.ndarray, second: np.ndarray) -> float:
    """Return the mean hue difference in degrees of two CIELAB arrays [H, W, 3], weighted by their common chroma."""
    c1, c2 = (np.sqrt(lab[..., 1] ** 2 + lab[..., 2] ** 2) for lab in (first, second))
    product = np.maximum(c1 * c2, 1e-6)
    cosine = (first[..., 1] * second[..., 1] + first[..., 2] * second[..., 2]) / product
    weight = np.sqrt(product)
    return float(np.degrees((np.arccos(np.clip(cosine, -1, 1)) * weight).sum() / weight.sum()))


def structural_similarity(x: np.ndarray, y: np.ndarray) -> float:
    """Return how much of the source's structure is preserved, 0..1, independent of exposure and colour.

    This is the structure term of SSIM (Wang et al. 2004) on luminance: local correlation in Gaussian windows, averaged
    with the source's local contrast as weight.

    Args:
        x: Luminance of the source, float32 0..1 [H, W].
        y: Luminance of the picture, of the same shape.
    """
    mx, my = _window(x), _window(y)
    vx, vy = np.maximum(_window(x * x) - mx * mx, 0), np.maximum(_window(y * y) - my * my, 0)
    local = (_window(x * y) - mx * my + 1e-5) / (np.sqrt(vx * vy) + 1e-5)
    weight = np.sqrt(vx) + 1e-3
    return float(max(0.0, (local * weight).sum() / weight.sum()))


def _window(values: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(values, (0, 0), 2.0, borderType=cv2.BORDER_REFLECT)


def box_iou(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    """Return the intersection over union of two boxes (left, top, right, bottom), 0..1."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    intersection = max(0.0, width) * max(0.0, height)
    areas = [max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (first, second)]
    return intersection / max(1e-9, sum(areas) - intersection)
