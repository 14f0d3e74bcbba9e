"""The browser's arithmetic against Python's: the very file that the page runs, on random cases."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from rewards import REWARDS, RewardFunction
from ui.playground.grid import SCORE_JS

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser


def cases(count: int) -> list[tuple[dict[str, float], dict[str, float | None]]]:
    """Weights in steps of the sliders, at least one above zero, and scores of which some are missing."""
    draw = random.Random(0)
    found: list[tuple[dict[str, float], dict[str, float | None]]] = []
    while len(found) < count:
        weights = {name: draw.choice([0.0, draw.randint(0, 20) / 20]) for name in REWARDS}
        scores = {name: draw.choice([None, 0.0, 1.0, draw.random(), draw.random()]) for name in REWARDS}
        if any(weights.values()):
            found.append((weights, scores))
    return found


def test_totals_are_pythons(browser: Browser) -> None:
    page = browser.new_page()
    drawn = cases(2000)
    totals = page.evaluate(f"cases => {{ {SCORE_JS}; return cases.map(one => total(...one)); }}", drawn)
    page.close()
    expected = [RewardFunction(weights).total(scores) for weights, scores in drawn]
    assert [total is None for total in totals] == [total is None for total in expected]
    known = [(one, other) for one, other in zip(totals, expected, strict=True) if other is not None]
    assert len(known) > 1000
    assert max(abs(one - other) for one, other in known) < 1e-12


def test_weights_of_zero_and_unknown_scores_have_no_total(browser: Browser) -> None:
    page = browser.new_page()
    asked = [[{"a": 0, "b": 0}, {"a": 1, "b": 1}], [{"a": 1}, {"a": None}], [{"a": 1}, {}], [{}, {}]]
    assert page.evaluate(f"cases => {{ {SCORE_JS}; return cases.map(one => total(...one)); }}", asked) == [None] * 4
    page.close()


def test_ranking_is_stable_and_puts_missing_totals_last(browser: Browser) -> None:
    page = browser.new_page()
    order = page.evaluate(f"totals => {{ {SCORE_JS}; return ranking(totals); }}", [None, 0.5, 0.9, 0.5, 0.0])
    means = page.evaluate(f"lists => {{ {SCORE_JS}; return lists.map(mean); }}", [[1, None, 2], [], [None]])
    page.close()
    assert order == [2, 1, 3, 4, 0]
    assert means == [1.5, None, None]
