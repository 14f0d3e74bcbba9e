"""Tests of fitting reward weights to choices, with simulated users of known weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import kendalltau

from recipes import load_photo, random_recipe
from rewards import EQUAL_WEIGHTS, REWARDS, RewardFunction, score_recipes
from training.data.bundled import bundled_photos
from training.preferences.fit import MIN_DECIDED, Choice, Outcome, Scores, agreement, fit_reward, next_pair

NAMES = list(REWARDS)
USERS = 50
CHOICES = 20
Groups = Sequence[Sequence[Scores]]
Rule = Callable[[Scores, Scores], Outcome]


def make_choices(
    rule: Rule, groups: Groups, count: int = CHOICES, start: RewardFunction = EQUAL_WEIGHTS
) -> list[Choice]:
    """Let a simulated user choose between the pairs that `next_pair` selects, in turn on each group."""
    choices: list[Choice] = []
    shown: list[set[tuple[int, int]]] = [set() for _ in groups]
    for number in range(count):
        group, seen = groups[number % len(groups)], shown[number % len(groups)]
        pair = next_pair(group, choices, start, seen)
        assert pair is not None and pair not in seen
        seen.add(pair)
        left, right = (group[index] for index in pair)
        choices.append(Choice(left, right, rule(left, right)))
    return choices


def simulated_user(seed: int, decisiveness: float) -> tuple[RewardFunction, Rule]:
    """Return a user's weights, and the user, who prefers the higher total with a probability that grows with it."""
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(len(NAMES)))
    function = RewardFunction(dict(zip(NAMES, weights.tolist(), strict=True)))

    def choose(left: Scores, right: Scores) -> Outcome:
        difference = (function.total(left) or 0.0) - (function.total(right) or 0.0)
        return "left" if rng.random() < expit(decisiveness * difference) else "right"

    return function, choose


def tau(first: RewardFunction, second: RewardFunction, groups: Groups) -> float:
    """Return the mean Kendall tau of two rankings of each group."""
    return float(
        np.mean([kendalltau([first.total(s) for s in group], [second.total(s) for s in group])[0] for group in groups])
    )


@pytest.fixture(scope="module")
def photo_groups() -> Groups:
    """Return the scores of 16 random recipes on each of 8 bundled photos."""
    rng = np.random.default_rng(0)
    photos = bundled_photos()[::8][:8]
    scored = [score_recipes(load_photo(photo.path), [random_recipe(rng) for _ in range(16)]) for photo in photos]
    return [[candidate.scores for candidate in group] for group in scored]


@pytest.fixture(scope="module")
def independent_groups() -> Groups:
    """Return 8 groups of 16 candidates whose scores are independent, so that the weights decide the ranking."""
    scores = np.random.default_rng(0).random((8, 16, len(NAMES)))
    return [[dict(zip(NAMES, row, strict=True)) for row in group] for group in scores.tolist()]


@pytest.mark.parametrize("candidates", ["photo_groups", "independent_groups"])
def test_twenty_choices_recover_the_ranking_of_unseen_candidates(
    candidates: str, request: pytest.FixtureRequest
) -> None:
    groups: Groups = request.getfixturevalue(candidates)
    before, after = [], []
    for seed in range(USERS):
        function, user = simulated_user(seed, decisiveness=30)
        fitted = fit_reward(make_choices(user, groups[:4]), EQUAL_WEIGHTS)
        before.append(tau(EQUAL_WEIGHTS, function, groups[4:]))
        after.append(tau(fitted.function, function, groups[4:]))
    assert np.median(after) >= 0.8
    if candidates == "independent_groups":  # the scores of real candidates agree so well that any weights rank alike
        assert np.median(before) < 0.7 and np.median(after) > 0.9


def test_selected_pairs_tell_more_than_random_ones(independent_groups: Groups) -> None:
    rng = np.random.default_rng(0)
    selected, drawn = [], []
    for seed in range(20):
        function, user = simulated_user(seed, decisiveness=30)
        selected.append(
            tau(
                fit_reward(make_choices(user, independent_groups[:4], 10), EQUAL_WEIGHTS).function,
                function,
                independent_groups[4:],
            )
        )
        pairs = [rng.choice(16, 2, replace=False) for _ in range(10)]
        choices = [
            Choice(group[a], group[b], user(group[a], group[b]))
            for (a, b), group in zip(pairs, independent_groups[:4] * 3, strict=False)
        ]
        drawn.append(tau(fit_reward(choices, EQUAL_WEIGHTS).function, function, independent_groups[4:]))
    assert np.median(selected) > np.median(drawn)


def test_fit_reports_agreement_and_intervals_that_narrow(independent_groups: Groups) -> None:
    sharp = RewardFunction({"sharpness": 1.0})
    user: Rule = lambda left, right: "left" if (sharp.total(left) or 0) > (sharp.total(right) or 0) else "right"  # noqa: E731
    choices = make_choices(user, independent_groups)
    fitted, early = fit_reward(choices, EQUAL_WEIGHTS), fit_reward(choices[:4], EQUAL_WEIGHTS)
    assert fitted.usable and fitted.message == ""
    assert (fitted.choices, fitted.decided) == (20, 20)
    assert fitted.agrees == agreement(choices, fitted.function) >= 18
    assert fitted.agrees_before == agreement(choices, EQUAL_WEIGHTS) < fitted.agrees
    weights = fitted.function.weights
    assert weights["sharpness"] == 1.0 and max(weights["colour"], weights["creativity"]) < 0.3
    for name in NAMES:
        assert 0 <= fitted.low[name] <= weights[name] <= fitted.high[name] <= 1
    assert fitted.high["colour"] - fitted.low["colour"] < early.high["colour"] - early.low["colour"]


def test_fit_starts_from_the_sliders(independent_groups: Groups) -> None:
    start = RewardFunction({"sharpness": 0.5, "colour": 0.1})
    nothing = fit_reward([], start)
    assert nothing.function == start and not nothing.usable and nothing.message == "No choices yet."
    a, b = {"sharpness": 0.9, "colour": 0.1, "creativity": 0.5}, {"sharpness": 0.1, "colour": 0.9, "creativity": 0.5}
    few = [Choice(a, b, "left")] * MIN_DECIDED
    fitted = fit_reward(few, start)  # confirms the start weights
    assert fitted.usable and fitted.agrees == fitted.agrees_before == MIN_DECIDED
    assert fitted.function.weights["sharpness"] == 0.5
    assert fitted.function.weights["colour"] == pytest.approx(0.1, abs=0.05)
    raised = fit_reward([Choice(b, a, "left")] * 10, RewardFunction({"sharpness": 1.0}))
    assert raised.function.weights["colour"] > raised.function.weights["sharpness"]  # although it was at zero


def test_too_few_choices_do_not_change_the_weights() -> None:
    a, b = dict.fromkeys(NAMES, 0.9), dict.fromkeys(NAMES, 0.1)
    fitted = fit_reward([Choice(a, b, "left")] * (MIN_DECIDED - 1), EQUAL_WEIGHTS)
    assert not fitted.usable and fitted.function == EQUAL_WEIGHTS
    assert fitted.message == "Choose a side in 1 more pair to fit the weights."


def test_all_equal_choices_give_a_message_and_no_extreme_weight(independent_groups: Groups) -> None:
    fitted = fit_reward(make_choices(lambda left, right: "equal", independent_groups), EQUAL_WEIGHTS)
    assert not fitted.usable and fitted.function == EQUAL_WEIGHTS
    assert "all 20 pairs equal" in fitted.message
    assert min(fitted.high.values()) > 0.5  # the intervals do not exclude any weight either


def test_contradictory_choices_give_a_message_and_no_extreme_weight(independent_groups: Groups) -> None:
    user = simulated_user(0, 30)[1]
    choices = make_choices(user, independent_groups, 10)
    contradictions = [*choices, *(Choice(choice.right, choice.left, choice.outcome) for choice in choices)]
    opposite: Rule = lambda left, right: "left" if EQUAL_WEIGHTS.total(left) < EQUAL_WEIGHTS.total(right) else "right"  # noqa: E731
    same = [dict.fromkeys(NAMES, value) for value in (0.2, 0.5, 0.7, 0.9)]
    for made in (contradictions, make_choices(opposite, [same] * 2, 12)):
        fitted = fit_reward(made, EQUAL_WEIGHTS)
        assert not fitted.usable and fitted.function == EQUAL_WEIGHTS
        assert "contradict each other" in fitted.message


def test_few_choices_that_disagree_ask_for_more() -> None:
    a, b = dict.fromkeys(NAMES, 0.9), dict.fromkeys(NAMES, 0.1)
    fitted = fit_reward([Choice(a, b, "right")] * 4, EQUAL_WEIGHTS)
    assert not fitted.usable and "agree with 0 of your 4 choices" in fitted.message


def test_choices_at_random_give_no_extreme_weight(photo_groups: Groups) -> None:
    rng = np.random.default_rng(0)
    fits = [
        fit_reward(make_choices(lambda left, right: ("left", "right")[rng.integers(2)], photo_groups), EQUAL_WEIGHTS)
        for _ in range(20)
    ]
    assert all(sorted(fitted.function.weights.values())[1] > 0.02 for fitted in fits)


def test_next_pair_skips_excluded_and_equal_pairs() -> None:
    a, b = {"sharpness": 0.9, "colour": 0.1, "creativity": 0.5}, {"sharpness": 0.1, "colour": 0.9, "creativity": 0.5}
    assert next_pair([a, b, a], [], EQUAL_WEIGHTS) == (0, 1)
    assert next_pair([a, b, a], [], EQUAL_WEIGHTS, [(1, 0)]) == (1, 2)
    assert next_pair([a, b, a], [], EQUAL_WEIGHTS, [(0, 1), (1, 2)]) is None  # only equal scores are left
    assert next_pair([a], [], EQUAL_WEIGHTS) is None


def test_missing_scores_are_left_out() -> None:
    a, b = {"sharpness": 0.9, "colour": None, "creativity": 0.5}, {"sharpness": 0.1, "colour": 0.9, "creativity": 0.5}
    fitted = fit_reward([Choice(a, b, "left")] * 5, EQUAL_WEIGHTS)
    assert fitted.usable and fitted.function.weights["sharpness"] >= fitted.function.weights["creativity"]
