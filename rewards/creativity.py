"""The reward `creativity`: new against the photo and against the group's other pictures, and still recognisable."""

from __future__ import annotations

import numpy as np

from rewards import compare

FRESH = 20.0  # colour difference (CIELAB) that counts as new


def creativity(source: np.ndarray, candidates: list[np.ndarray]) -> list[float | None]:
    """First version; see the definition in the module's constants."""
    pairs = [compare.pair(source, picture) for picture in candidates]
    palettes = [_palette(pair.picture) for pair in pairs]
    scores: list[float | None] = []
    for index, pair in enumerate(pairs):
        others = [
            _distance(palettes[index], palettes[at]) + _reframed(pair.box, pairs[at].box)
            for at in range(len(pairs))
            if at != index
        ]
        scores.append(_one(pair) * (_new(min(others) / 2) if others else 1.0))
    return scores


def _one(pair: compare.Pair) -> float:
    one, other = compare.small(pair.source), compare.small(pair.picture)
    moved = np.linalg.norm(compare.lab(one) - compare.lab(other), axis=-1).mean() + _reframed((0, 0, 1, 1), pair.box)
    known = compare.structure(one, other)
    burnt = max(0.0, compare.clipped(pair.picture) - compare.clipped(pair.source))
    return float(_new(moved) * known**2 * np.exp(-burnt / 0.15) * pair.area**0.25)


def _new(distance: float) -> float:
    return float(1 - np.exp(-((distance / FRESH) ** 2)))


def _palette(picture: np.ndarray) -> np.ndarray:
    values = np.sort(compare.lab(compare.small(picture)).reshape(-1, 3), axis=0)
    return values[np.linspace(0, len(values) - 1, 17).round().astype(int)]


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(np.abs(one - other).mean(axis=0)))


def _reframed(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return 20.0 * (1 - shared / (sum(areas) - shared))
