"""How a candidate compares with its source: where it was cut out, how far its colours moved, what was clipped, whether
the content can still be recognised. Shared by the rewards; colours and structure on small versions, to cost little."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

SMALL_SIDE = 64  # largest side of the versions on which colours and structure are compared
_COARSE, _SAMPLE = 8, 4  # a crop is looked for at 1/8 first, then among a few places by every fourth pixel


@dataclass(frozen=True)
class Pair:
    """A candidate beside the part of the source that it shows, both uint8 RGB; `area` is that part's share."""

    source: np.ndarray
    picture: np.ndarray
    area: float
    box: tuple[float, float, float, float]  # left, top, right, bottom of that part, 0..1 of the source


def pair(source: np.ndarray, picture: np.ndarray) -> Pair:
    """Finds a candidate uint8 [h, w, 3] in its source uint8 [H, W, 3]: the place where their luminance correlates best.

    A candidate of the source's size is the whole; one that is larger in any direction is compared as a resized whole.
    """
    (height, width), (h, w) = source.shape[:2], picture.shape[:2]
    if (h, w) == (height, width):
        return Pair(source, picture, 1.0, (0.0, 0.0, 1.0, 1.0))
    if h > height or w > width:
        resized = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
        return Pair(source, resized, 1.0, (0.0, 0.0, 1.0, 1.0))
    x, y = _find(cv2.cvtColor(source, cv2.COLOR_RGB2GRAY), cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY))
    box = (x / width, y / height, (x + w) / width, (y + h) / height)
    return Pair(source[y : y + h, x : x + w], picture, (h * w) / (height * width), box)


def _find(source: np.ndarray, part: np.ndarray) -> tuple[int, int]:
    """Left and top of a part in its source (both uint8 grey): the best correlation at 1/8, then the best one among the
    places nearby where a recipe can have cut, which is exact for a recipe's crop."""
    x, y = (_COARSE * at for at in _best(_reduced(source, _COARSE), _reduced(part, _COARSE)))
    (height, width), (h, w) = source.shape, part.shape
    places = [(left, top) for top in _cuts(y, height, h) for left in _cuts(x, width, w)]
    if len(places) == 1:
        return places[0]
    sample = _centred(part[::_SAMPLE, ::_SAMPLE])

    def likeness(place: tuple[int, int]) -> float:
        view = _centred(source[place[1] : place[1] + h : _SAMPLE, place[0] : place[0] + w : _SAMPLE])
        return float(np.vdot(sample, view) / np.sqrt(np.vdot(view, view) + 1))

    return max(places, key=likeness)


def _centred(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float32)
    return values - values.mean()


def _cuts(start: int, whole: int, part: int) -> list[int]:
    """The starts near one at which a crop in whole percents has this length; the start itself when there is none."""
    ends = {-(-whole * high // 100) for high in range(60, 101)}
    cuts = {whole * low // 100 for low in range(41)}
    near = sorted(cut for cut in cuts if cut + part in ends and abs(cut - start) <= 1.5 * _COARSE)
    return near or [min(max(start, 0), whole - part)]


def _reduced(grey: np.ndarray, scale: int) -> np.ndarray:
    size = max(1, round(grey.shape[1] / scale)), max(1, round(grey.shape[0] / scale))
    return cv2.resize(grey, size, interpolation=cv2.INTER_AREA)


def _best(image: np.ndarray, part: np.ndarray) -> tuple[int, int]:
    if part.shape[0] > image.shape[0] or part.shape[1] > image.shape[1]:
        return 0, 0
    found = np.nan_to_num(cv2.matchTemplate(image, part, cv2.TM_CCOEFF_NORMED), nan=-1.0, posinf=-1.0, neginf=-1.0)
    y, x = np.unravel_index(int(np.argmax(found)), found.shape)
    return int(x), int(y)


def small(picture: np.ndarray, limit: int = SMALL_SIDE) -> np.ndarray:
    """A picture uint8 [H, W, 3] as float32 sRGB 0..1, halved by averaging until its long side is at most the limit."""
    while max(picture.shape[:2]) > limit:
        size = max(1, picture.shape[1] // 2), max(1, picture.shape[0] // 2)
        even = picture[: 2 * size[1], : 2 * size[0]]  # exact halves are OpenCV's fast case
        picture = cv2.resize(even, size, interpolation=cv2.INTER_AREA)
    return picture.astype(np.float32) / 255


def lab(picture: np.ndarray) -> np.ndarray:
    """float32 sRGB 0..1 [H, W, 3] to CIELAB (D65): L 0..100, a and b about -100..100."""
    return cv2.cvtColor(picture, cv2.COLOR_RGB2LAB)


def clipped(picture: np.ndarray) -> float:
    """The share of pixels of a uint8 picture with a channel at an end of its range (<= 1 or >= 254), each fourth row:
    that is enough."""
    inside = cv2.inRange(picture[::4], (2, 2, 2), (253, 253, 253))
    return 1.0 - cv2.countNonZero(inside) / inside.size


def fidelity(source: np.ndarray, picture: np.ndarray) -> float:
    """Mean CIEDE2000 between two uint8 pictures of one view, on small versions: 2.3 is just noticeable."""
    return difference(lab(small(source)), lab(small(picture)))


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Mean CIEDE2000 of two small CIELAB arrays [H, W, 3], over every second pixel of every second row."""
    return float(ciede2000(one[::2, ::2], other[::2, ::2]).mean())


def ciede2000(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Colour difference of two CIELAB arrays [..., 3] (Sharma, Wu and Dalal 2005; kL = kC = kH = 1)."""
    (l1, a1, b1), (l2, a2, b2) = np.moveaxis(one, -1, 0), np.moveaxis(other, -1, 0)
    mean7 = _seventh((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2)
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
    chroma7 = _seventh(chroma)
    rotation = (
        -2 * np.sqrt(chroma7 / (chroma7 + 25.0**7)) * np.sin(np.radians(60 * np.exp(-(((degrees - 275) / 25) ** 2))))
    )
    d_l, d_c = (l2 - l1) / s_l, (c2 - c1) / s_c
    d_h = 2 * np.sqrt(c1 * c2) * np.sin(turn / 2) / s_h
    return np.sqrt(np.maximum(d_l**2 + d_c**2 + d_h**2 + rotation * d_c * d_h, 0))


def _seventh(values: np.ndarray) -> np.ndarray:
    cubes = values * values * values
    return cubes * cubes * values


def structure(source: np.ndarray, picture: np.ndarray) -> float:
    """How much of the source's structure is kept, 0..1, whatever happened to its light and colours.

    The structure term of SSIM (Wang et al. 2004) on luminance: local correlation in Gaussian windows, averaged with the
    weight of the source's local contrast. Both are float32 sRGB [H, W, 3] of one size.
    """
    x, y = cv2.cvtColor(source, cv2.COLOR_RGB2GRAY), cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    mx, my = _window(x), _window(y)
    vx, vy = np.maximum(_window(x * x) - mx * mx, 0), np.maximum(_window(y * y) - my * my, 0)
    local = (_window(x * y) - mx * my + 1e-5) / (np.sqrt(vx * vy) + 1e-5)
    weight = np.sqrt(vx) + 1e-3
    return float(max(0.0, (local * weight).sum() / weight.sum()))


def _window(values: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(values, (0, 0), 2.0, borderType=cv2.BORDER_REFLECT)
