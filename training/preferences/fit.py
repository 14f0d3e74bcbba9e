"""Fit reward weights to choices between candidates, and select the pair to ask about next. Imports no torch.

The model is that of Bradley and Terry (1952, doi:10.2307/2334029) on differences of reward scores: the left candidate
of a pair is preferred with probability sigmoid(sum_i w_i (left_i - right_i)), w_i = exp(theta_i) > 0. An equal choice
counts as half a choice of each side. A Gaussian prior on theta pulls the ratios of the weights to those of the start
weights, and their common scale, which says how decided the choices are, to a typical one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from rewards import REWARDS, RewardFunction

Scores = Mapping[str, float | None]
Outcome = Literal["left", "right", "equal"]

RATIO_SPREAD = 1.5  # prior standard deviation of the log-ratios: a weight may well be 4 times the start weight
SCALE = 30.0  # prior sum of the weights: a total that is .05 higher is preferred in 82 % of the choices
SCALE_SPREAD = 1.0  # prior standard deviation of the log of that sum
MIN_SHARE = 0.05  # of a reward whose slider is at zero, so that choices can raise it
MIN_DECIDED = 3  # choices of one side, below which the weights are not changed
EARLY = 8  # choices of one side, below which disagreement may be chance
MIN_DEVIATIONS = 1.0  # standard deviations by which the fit must agree with more choices than a coin does
POSTERIOR_SAMPLES = 2_000
INTERVAL = (5, 95)  # percentiles


@dataclass(frozen=True)
class Choice:
    """One choice between two candidates of the same photo.

    Attributes:
        left: Scores of the left candidate by reward name; None where a reward does not apply.
        right: Scores of the right one.
        outcome: The preferred side, or "equal".
    """

    left: Scores
    right: Scores
    outcome: Outcome


@dataclass(frozen=True)
class FittedReward:
    """Reward weights fitted to choices.

    Attributes:
        function: The fitted weights; the largest is the largest start weight. The start weights if `usable` is False.
        start: The start weights.
        low: Lower end of the 90 % interval of each weight by name, from the Laplace approximation.
        high: Upper end.
        choices: Number of choices, including equal ones.
        decided: Number of choices of one side.
        agrees: Decided choices whose preferred candidate has the higher total with the fitted weights.
        agrees_before: The same with the start weights.
        usable: Whether the choices determine weights. If not, `message` says why.
        message: Note for the user; may be empty.
    """

    function: RewardFunction
    start: RewardFunction
    low: dict[str, float]
    high: dict[str, float]
    choices: int
    decided: int
    agrees: int
    agrees_before: int
    usable: bool
    message: str


@dataclass(frozen=True)
class _Posterior:
    """Laplace approximation of theta.

    Attributes:
        mean: Most probable theta, [R].
        covariance: Its covariance, [R, R].
    """

    mean: np.ndarray
    covariance: np.ndarray


def fit_reward(choices: Sequence[Choice], start: RewardFunction) -> FittedReward:
    """Fit reward weights to choices.

    Args:
        choices: The choices, in any order.
        start: The weights from which the fit starts, such as those on the sliders.
    """
    decided = [choice for choice in choices if choice.outcome != "equal"]
    posterior = _posterior(choices, start)
    fitted = _to_function(posterior.mean, start)
    message = _refusal(len(choices), len(decided), agreement(decided, fitted))
    function = start if message else fitted
    low, high = _intervals(posterior, start)
    return FittedReward(
        function=function,
        start=start,
        low=low,
        high=high,
        choices=len(choices),
        decided=len(decided),
        agrees=agreement(decided, function),
        agrees_before=agreement(decided, start),
        usable=not message,
        message=message,
    )


def agreement(choices: Iterable[Choice], function: RewardFunction) -> int:
    """Return how many choices of one side prefer the candidate with the higher total."""
    count = 0
    for choice in choices:
        left, right = function.total(choice.left), function.total(choice.right)
        if left is not None and right is not None and choice.outcome != "equal":
            count += (left > right) if choice.outcome == "left" else (right > left)
    return count


def next_pair(
    candidates: Sequence[Scores],
    choices: Sequence[Choice],
    start: RewardFunction,
    excluded: Iterable[tuple[int, int]] = (),
) -> tuple[int, int] | None:
    """Return the pair of candidates whose choice the fitted model is least sure of.

    That is the pair whose choice is expected to tell most about the weights: its outcome is open because the weights
    are uncertain, not because both candidates have the same scores (Bayesian D-optimal design).

    Args:
        candidates: Scores of the candidates of one photo.
        choices: The choices so far, also those on other photos.
        start: The start weights.
        excluded: Pairs that are not to be shown, as indices in any order.

    Returns:
        Two indices, the smaller first; None if all pairs are excluded or have equal scores.
    """
    seen = {(min(pair), max(pair)) for pair in excluded}
    pairs = [pair for pair in combinations(range(len(candidates)), 2) if pair not in seen]
    if not pairs:
        return None
    posterior = _posterior(choices, start)
    differences = np.array([_difference(candidates[left], candidates[right]) for left, right in pairs])
    gradients = differences * np.exp(posterior.mean)
    probability = _sigmoid(gradients.sum(axis=1))
    variance = np.einsum("pi,ij,pj->p", gradients, posterior.covariance, gradients)
    information = np.log1p(probability * (1 - probability) * variance)
    best = int(np.argmax(information))
    return pairs[best] if np.any(differences[best]) else None


def _difference(left: Scores, right: Scores) -> list[float]:
    """Return the differences of the scores [R]; 0 where a reward does not apply to both."""
    values = [(left.get(name), right.get(name)) for name in REWARDS]
    return [0.0 if a is None or b is None else a - b for a, b in values]


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(values, -500, 500)))


def _shares(start: RewardFunction) -> np.ndarray:
    """Return the start weights [R] as shares, at least MIN_SHARE each before they are normalized again."""
    weights = np.array([start.weights.get(name, 0.0) for name in REWARDS])
    shares = np.maximum(weights / weights.sum(), MIN_SHARE)
    return shares / shares.sum()


def _posterior(choices: Sequence[Choice], start: RewardFunction) -> _Posterior:
    """Return the most probable theta and its covariance."""
    from scipy.optimize import minimize  # takes a third of a second to import

    prior = np.log(_shares(start)) + np.log(SCALE)
    count = len(prior)
    common = np.full((count, count), 1 / count)
    precision = (np.eye(count) - common) / RATIO_SPREAD**2 + common / SCALE_SPREAD**2
    rows = np.array([_difference(choice.left, choice.right) for choice in choices]).reshape(-1, count)
    targets = np.array([{"left": 1.0, "right": 0.0, "equal": 0.5}[choice.outcome] for choice in choices])

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        weighted = rows * np.exp(theta)
        logits = weighted.sum(axis=1)
        change = theta - prior
        loss = np.sum(np.logaddexp(0, logits) - targets * logits) + change @ precision @ change / 2
        return float(loss), weighted.T @ (_sigmoid(logits) - targets) + precision @ change

    bounds = list(zip(prior - 6, prior + 6, strict=True))  # only keeps exp() finite: the prior is 6 spreads away
    mean = minimize(objective, prior, jac=True, method="L-BFGS-B", bounds=bounds).x
    weighted = rows * np.exp(mean)
    probability = _sigmoid(weighted.sum(axis=1))
    information = (weighted * (probability * (1 - probability))[:, None]).T @ weighted  # Fisher: positive definite
    return _Posterior(mean, np.linalg.inv(information + precision))


def _to_weights(theta: np.ndarray, start: RewardFunction) -> np.ndarray:
    """Return weights [..., R] of which the largest is the largest start weight."""
    weights = np.exp(theta - theta.max(axis=-1, keepdims=True))
    return weights * max(start.weights.values())


def _to_function(theta: np.ndarray, start: RewardFunction) -> RewardFunction:
    weights = _to_weights(theta, start)
    return RewardFunction({name: round(float(weight), 3) for name, weight in zip(REWARDS, weights, strict=True)})


def _intervals(posterior: _Posterior, start: RewardFunction) -> tuple[dict[str, float], dict[str, float]]:
    samples = np.random.default_rng(0).multivariate_normal(posterior.mean, posterior.covariance, POSTERIOR_SAMPLES)
    low, high = np.percentile(_to_weights(samples, start), INTERVAL, axis=0).round(3)
    return dict(zip(REWARDS, low.tolist(), strict=True)), dict(zip(REWARDS, high.tolist(), strict=True))


def _refusal(choices: int, decided: int, agrees: int) -> str:
    """Return why the choices determine no weights; "" if they do."""
    if not choices:
        return "No choices yet."
    if not decided:
        pairs = "the pair" if choices == 1 else f"all {choices} pairs"
        return f"You called {pairs} equal, which says nothing about the weights. They stay as they are."
    if decided < MIN_DECIDED:
        missing = MIN_DECIDED - decided
        return f"Choose a side in {missing} more pair{'' if missing == 1 else 's'} to fit the weights."
    by_chance = decided / 2 + MIN_DEVIATIONS * decided**0.5 / 2  # a coin agrees with n/2 ± sqrt(n)/2
    if agrees < by_chance and decided < EARLY:
        return (
            f"The best weights agree with {agrees} of your {decided} choices, which may be chance. Choose in more "
            "pairs; the weights stay as they are."
        )
    if agrees < by_chance:
        return (
            f"Your choices contradict each other, or depend on something that no reward measures: the best weights "
            f"agree with {agrees} of {decided}. The weights stay as they are."
        )
    return ""
