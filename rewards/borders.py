"""Borders: uniform or blurred strips around a photo, and the box of its content."""

from __future__ import annotations

import cv2
import numpy as np

FLAT = 1.3  # grey levels: mean difference of neighbouring rows, and mean curvature along them, inside a border
STEP = 5  # grey levels by which a pixel changes at the end of a border
STEP_SHARE, OTHER_STEP_SHARE = 0.6, 0.5  # share of the row that changes there: of the first border, of further ones
STEEPNESS = 0.6  # share of the change over eight rows that happens within two
MAX_DEPTH = 0.42  # of the height or width, on each side
_MIN_DEPTH, _RINGING = 0.015, 10  # share of the side; px in which JPEG blurs the end of a border


def content_box(photo: np.ndarray) -> tuple[float, float, float, float]:
    """Return left, top, right, bottom (0..1) of a photo (uint8 [H, W, 3]) without its borders.

    A border is a strip that is uniform or blurred, and that ends with a straight step.
    """
    grey = cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY).astype(np.int16)
    height, width = grey.shape
    depths = [0, 0, 0, 0]  # left, top, right, bottom
    for step_share in (STEP_SHARE, OTHER_STEP_SHARE):  # a strip beside the photo hides part of the step above it
        if step_share == OTHER_STEP_SHARE and not any(depths):
            break
        for side in range(4):
            left, top, right, bottom = depths
            inside = grey[top : height - bottom, left : width - right]
            turned = (inside.T, inside, inside.T[::-1], inside[::-1])[side]
            depths[side] += _depth(turned, step_share) if not depths[side] else 0
    left, top, right, bottom = depths
    return left / width, top / height, 1 - right / width, 1 - bottom / height


def _depth(grey: np.ndarray, step_share: float) -> int:
    """Return the number of border rows at the top of int16 [H, W]."""
    height, width = grey.shape
    limit = int(MAX_DEPTH * height)
    if limit < 8 or width < 8:
        return 0
    rows = grey[: limit + _RINGING]
    change = np.abs(np.diff(rows, axis=0)).mean(axis=1)
    curvature = np.abs(rows[:, 2:] - 2 * rows[:, 1:-1] + rows[:, :-2]).mean(axis=1)
    rough = np.flatnonzero((change > FLAT) | (curvature[1:] > FLAT))
    if not len(rough) or rough[0] < max(2, _MIN_DEPTH * height):
        return 0
    first = int(rough[0])
    ends = range(max(first, 3), min(first + _RINGING, len(rows) - 6))
    shares = [_step_share(rows, row) for row in ends]
    if not shares or max(shares) < step_share:
        return 0
    return ends[int(np.argmax(shares))] + 2


def _step_share(rows: np.ndarray, row: int) -> float:
    """Return the share of a row's pixels that change within two rows and by no more around them, as at a sharp edge."""
    near, around = np.abs(rows[row + 2] - rows[row]), np.abs(rows[row + 5] - rows[row - 3])
    return float(((near > STEP) & (near >= STEEPNESS * around)).mean())
