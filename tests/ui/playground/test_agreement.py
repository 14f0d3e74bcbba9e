"""Tests of the agreement between a model's candidates."""

from __future__ import annotations

from dataclasses import replace

import pytest

from inference.types import Box, Point
from recipes import Recipe
from ui.playground.agreement import same_answers
from ui.playground.compare import Candidate

BOX = Box(0.1, 0.1, 0.5, 0.5)


def answers(*changes: dict) -> list[Candidate]:
    """Create finished candidates."""
    return [Candidate(index, done=True, **change) for index, change in enumerate(changes)]


@pytest.mark.parametrize(
    ("skill", "changes", "expected"),
    [
        ("recipe", [{"recipe": Recipe(exposure=level)} for level in (10, 20, 10)], {0: 0, 1: 1, 2: 0}),
        ("recipe", [{"text": "no"}, {"text": "no"}, {"text": "no", "recipe": Recipe()}], {0: 0, 1: 0, 2: 2}),
        ("query", [{"text": "A  cat."}, {"text": "a dog."}, {"text": "a cat. "}], {0: 0, 1: 1, 2: 0}),
        ("detect", [{"boxes": (BOX,)}, {"boxes": (replace(BOX, x_max=0.52),)}, {"boxes": ()}], {0: 0, 1: 0, 2: 2}),
        ("detect", [{"boxes": (BOX,)}, {"boxes": (BOX, BOX)}], {0: 0, 1: 1}),
        ("detect", [{"boxes": (BOX,)}, {"boxes": (replace(BOX, x_min=0.3),)}], {0: 0, 1: 0}),
        ("detect", [{"boxes": (BOX,)}, {"boxes": (replace(BOX, x_min=0.35),)}], {0: 0, 1: 1}),
        ("detect", [{}, {}], {0: 0, 1: 0}),
        ("point", [{"points": (Point(0.2, x),)} for x in (0.2, 0.24, 0.3)], {0: 0, 1: 0, 2: 2}),
        ("point", [{"points": (Point(0.2, 0.2), Point(0.8, 0.8))}, {"points": (Point(0.8, 0.8),)}], {0: 0, 1: 1}),
        ("segment", [{"path": "M 0 0"}, {"path": "M 0 0"}, {"path": "M 1 0"}], {0: 0, 1: 0, 2: 2}),
    ],
)
def test_equal_answers_have_the_index_of_the_first(skill: str, changes: list[dict], expected: dict[int, int]) -> None:
    assert same_answers(answers(*changes), skill) == expected


def test_order_of_the_boxes_does_not_matter() -> None:
    other = Box(0.6, 0.6, 0.9, 0.9)
    assert same_answers(answers({"boxes": (BOX, other)}, {"boxes": (other, BOX)}), "detect") == {0: 0, 1: 0}


def test_unfinished_and_failed_candidates_agree_with_none() -> None:
    candidates = [Candidate(0, "a cat"), Candidate(1, "a cat", done=True), Candidate(2, "a cat", True, error="failed")]
    assert same_answers(candidates, "caption") == {1: 1}
