"""Agreement of a model's candidates: which of them give the same answer. Uses no Gradio."""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot

from inference.types import SKILLS, Box, Point
from rewards.image_metrics import box_iou
from ui.playground.compare import Candidate

MIN_IOU = 0.5  # mean IoU of the boxes of two equal answers
MAX_DISTANCE = 0.05  # between points of two equal answers, as a share of the photo's sides


def same_answers(candidates: Sequence[Candidate], skill: str) -> dict[int, int]:
    """Return, for each finished candidate, the index of the first one with the same answer; its own if it is the first.

    Recipes and texts are equal if they are the same, whatever the case and the spaces; boxes by their overlap (IoU),
    points by their distance, outlines by their path.
    """
    firsts: list[Candidate] = []
    same: dict[int, int] = {}
    for candidate in candidates:
        if candidate.done and not candidate.error:
            first = next((first for first in firsts if _is_same(first, candidate, skill)), candidate)
            if first is candidate:
                firsts.append(candidate)
            same[candidate.index] = first.index
    return same


def _is_same(first: Candidate, second: Candidate, skill: str) -> bool:
    output = SKILLS[skill].output
    if output == "recipe" and first.recipe and second.recipe:
        return first.recipe == second.recipe
    if output != "regions":
        return _normalized(first.text) == _normalized(second.text) and not (first.recipe or second.recipe)
    return (
        first.path == second.path
        and _mean_iou(first.boxes, second.boxes) >= MIN_IOU
        and _are_near(first.points, second.points)
    )


def _normalized(text: str) -> str:
    return " ".join(text.casefold().split())


def _mean_iou(first: Sequence[Box], second: Sequence[Box]) -> float:
    """Match each box with the best free one and return the mean IoU: 1 without boxes, 0 for different numbers."""
    if len(first) != len(second):
        return 0.0
    free = [(box.x_min, box.y_min, box.x_max, box.y_max) for box in second]
    total = 0.0
    for box in first:
        corners = (box.x_min, box.y_min, box.x_max, box.y_max)
        best = max(free, key=lambda other: box_iou(corners, other))
        total += box_iou(corners, best)
        free.remove(best)
    return total / len(first) if first else 1.0


def _are_near(first: Sequence[Point], second: Sequence[Point]) -> bool:
    """Whether two answers have equally many points, each near a free one of the other."""
    free = list(second)
    for point in first:
        if not free:
            return False
        nearest = min(free, key=lambda other: hypot(other.x - point.x, other.y - point.y))
        if hypot(nearest.x - point.x, nearest.y - point.y) > MAX_DISTANCE:
            return False
        free.remove(nearest)
    return not free
