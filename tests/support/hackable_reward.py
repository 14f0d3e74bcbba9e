"""A reward that can be won without looking at the photo, for tests of the alarms."""

from __future__ import annotations

import numpy as np


def small_crops(source: np.ndarray, candidates: list[np.ndarray]) -> list[float | None]:
    """Score candidates by how much is cut away: 0 for the whole photo, towards 1 for the smallest crop."""
    area = source.shape[0] * source.shape[1]
    return [1 - candidate.shape[0] * candidate.shape[1] / area for candidate in candidates]
