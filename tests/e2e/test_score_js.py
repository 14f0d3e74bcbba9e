"""Tests of score.js: its totals equal those of Python on random inputs."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from rewards import REWARDS, RewardFunction
from ui.playground.grid import SCORE_JS

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser


def random_cases(count: int) -> list[tuple[dict[str, float], dict[str, float | None]]]:
    """Draw weights in steps of the sliders, at least one above zero, and scores of which some are missing."""
    rng = random.Random(0)
    drawn: list[tuple[dict[str, float], dict[str, float | None]]] = []
    while len(drawn) < count:
        weights = {name: rng.choice([0.0, rng.randint(0, 20) / 20]) for name in REWARDS}
        scores = {name: rng.choice([None, 0.0, 1.0, rng.random(), rng.random()]) for name in REWARDS}
        if any(weights.values()):
            drawn.append((weights, scores))
    return drawn


def test_totals_equal_python(browser: Browser) -> None:
    page = browser.new_page()
    drawn = random_cases(2000)
    totals = page.evaluate(f"cases => {{ {SCORE_JS}; return cases.map(arguments => total(...arguments)); }}", drawn)
    page.close()
    expected = [RewardFunction(weights).total(scores) for weights, scores in drawn]
    assert [total is None for total in totals] == [total is None for total in expected]
    known = [(value, other) for value, other in zip(totals, expected, strict=True) if other is not None]
    assert len(known) > 1000
    assert max(abs(value - other) for value, other in known) < 1e-12


def test_zero_weights_and_missing_scores_give_no_total(browser: Browser) -> None:
    page = browser.new_page()
    inputs = [[{"a": 0, "b": 0}, {"a": 1, "b": 1}], [{"a": 1}, {"a": None}], [{"a": 1}, {}], [{}, {}]]
    assert (
        page.evaluate(f"cases => {{ {SCORE_JS}; return cases.map(arguments => total(...arguments)); }}", inputs)
        == [None] * 4
    )
    page.close()


def test_ranking_is_stable_with_missing_totals_last(browser: Browser) -> None:
    page = browser.new_page()
    order = page.evaluate(f"totals => {{ {SCORE_JS}; return ranking(totals); }}", [None, 0.5, 0.9, 0.5, 0.0])
    means = page.evaluate(f"lists => {{ {SCORE_JS}; return lists.map(mean); }}", [[1, None, 2], [], [None]])
    page.close()
    assert order == [2, 1, 3, 4, 0]
    assert means == [1.5, None, None]
