"""A candidate compared with its photo: what all rewards measure, computed once per photo and once per candidate."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from rewards import image_metrics
from rewards.borders import content_box
from rewards.focus import halo_strength
from rewards.measures import Measures, as_seen, measure
from rewards.subject import Box, Framing, Subject, find_subject, framing

_CACHE_SIZE = 512  # comparisons and photos that are kept, a few ten kB each
_QUANTILES = 33
_WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class PhotoProfile:
    """What is measured once per photo.

    Attributes:
        content: Box of the photo without its borders, 0..1.
        subject: The subject, in coordinates of the content.
        measures: Measures of the content.
    """

    content: Box
    subject: Subject
    measures: Measures


@dataclass(frozen=True)
class Comparison:
    """A candidate and its photo. Colours and tones are compared without borders and on the common part only.

    Attributes:
        photo: The photo.
        measures: Measures of the candidate.
        framing: What the crop keeps of the content and of the subject.
        border: Share of the candidate that is border.
        change: Mean CIEDE2000 to the photo.
        hue_shift: Mean hue difference in degrees, weighted by chroma.
        structure: How much of the photo's structure is preserved, 0..1; see `image_metrics.structural_similarity`.
        halo: Mean overshoot at edges; see `focus.halo_strength`.
        box: The part of the photo that is shown, 0..1.
        palette: Sorted L*, a* and b* of the candidate, float32 [33, 3].
    """

    photo: PhotoProfile
    measures: Measures
    framing: Framing
    border: float
    change: float
    hue_shift: float
    structure: float
    halo: float
    box: Box
    palette: np.ndarray


def compare(source: np.ndarray, candidates: list[np.ndarray]) -> list[Comparison]:
    """Compare candidates with their source (uint8 [H, W, 3] RGB). Results are cached by the pixels."""
    key = _digest(source)
    photo = _profile(source, key)
    return [
        _cache.get((key, _digest(picture)), lambda picture=picture: _compare(source, photo, picture))
        for picture in candidates
    ]


def profile(photo: np.ndarray) -> PhotoProfile:
    """Measure a photo (uint8 [H, W, 3] RGB). Results are cached by the pixels."""
    return _profile(photo, _digest(photo))


def _profile(photo: np.ndarray, key: Hashable) -> PhotoProfile:
    return _cache.get(key, lambda: _measure_photo(photo))


def _measure_photo(photo: np.ndarray) -> PhotoProfile:
    content = content_box(photo)
    inside = _cut(photo, content)
    return PhotoProfile(content, find_subject(inside), measure(inside))


def _compare(source: np.ndarray, photo: PhotoProfile, picture: np.ndarray) -> Comparison:
    pair = image_metrics.align(source, picture)
    common = _intersection(photo.content, pair.box)
    before, after = pair.source, pair.picture
    if photo.content != _WHOLE and common is not None:
        part = relative_box(common, pair.box)
        before, after = _cut(before, part), _cut(after, part)
    shown = relative_box(common or pair.box, photo.content)
    inside = 1.0 if common is None else _area(common) / max(_area(pair.box), 1e-9)
    whole = before is source or (pair.area == 1 and photo.content == _WHOLE)
    reference = photo.measures if whole else None
    measures = measure(after)
    lab, grey = _aligned(before, reference)
    values = np.sort(measures.lab.reshape(-1, 3), axis=0)
    return Comparison(
        photo=photo,
        measures=measures,
        framing=framing(photo.subject, shown),
        border=0.0 if common is None else max(0.0, 1 - inside),
        change=image_metrics.mean_ciede2000(lab, measures.lab),
        hue_shift=image_metrics.hue_shift(lab, measures.lab),
        structure=image_metrics.structural_similarity(lab[..., 0] / 100, measures.lab[..., 0] / 100),
        halo=halo_strength(grey, measures.grey),
        box=pair.box,
        palette=values[np.linspace(0, len(values) - 1, _QUANTILES).round().astype(int)],
    )


def _aligned(before: np.ndarray, reference: Measures | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the small CIELAB version and the luminance of the common part of the photo."""
    if reference is not None:
        return reference.lab, reference.grey
    return image_metrics.to_lab(as_seen(before)), cv2.cvtColor(before, cv2.COLOR_RGB2GRAY)


def _cut(picture: np.ndarray, box: Box) -> np.ndarray:
    """Return the part of a picture in a box (0..1), at least one pixel."""
    if box == _WHOLE:
        return picture
    height, width = picture.shape[:2]
    x, y = min(round(box[0] * width), width - 1), min(round(box[1] * height), height - 1)
    right, bottom = max(x + 1, round(box[2] * width)), max(y + 1, round(box[3] * height))
    return np.ascontiguousarray(picture[y:bottom, x:right])


def _intersection(first: Box, second: Box) -> Box | None:
    """Return the common part of two boxes; None if it is nearly empty."""
    left, top = max(first[0], second[0]), max(first[1], second[1])
    right, bottom = min(first[2], second[2]), min(first[3], second[3])
    return (left, top, right, bottom) if right - left > 0.02 and bottom - top > 0.02 else None


def relative_box(box: Box, frame: Box) -> Box:
    """Return a box in the coordinates of a frame."""
    width, height = max(frame[2] - frame[0], 1e-9), max(frame[3] - frame[1], 1e-9)
    left, top = (box[0] - frame[0]) / width, (box[1] - frame[1]) / height
    return left, top, (box[2] - frame[0]) / width, (box[3] - frame[1]) / height


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _digest(picture: np.ndarray) -> Hashable:
    return picture.shape, hash(picture.tobytes())


class _Cache:
    """A thread-safe cache of the most recently used values."""

    def __init__(self, size: int) -> None:
        self.size, self.values, self.lock = size, OrderedDict[Hashable, Any](), threading.Lock()

    def get(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        with self.lock:
            if key in self.values:
                self.values.move_to_end(key)
                return self.values[key]
        value = compute()
        with self.lock:
            self.values[key] = value
            while len(self.values) > self.size:
                self.values.popitem(last=False)
        return value


_cache = _Cache(_CACHE_SIZE)
