"""The leaderboard of an evaluation, computed from stored scores: moving a weight renders nothing again.

A photo counts with its best candidate: that is the picture which the application delivers. Every candidate is scored as
a group of one, so that models, temperatures and the references are comparable.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from rewards import REWARDS, RewardFunction
from rewards.report import total_scores
from training.evaluations.evaluation import Results

BOOTSTRAP_SAMPLES = 2_000
TIE = 1e-9  # totals that differ by less are equal, which counts as half a win
UNTOUCHED, BEST_OF_POOL = "untouched photo", "best of {} recipes"


@dataclass(frozen=True)
class Totals:
    """Totals of an evaluation for one reward function.

    Attributes:
        labels: Names of the models, then of the references.
        best: Total of the best candidate, float64 [photos, rows]; NaN where there is no answer.
        mean: Mean total of the candidates, float64 [photos, rows].
        parts: Scores of the best candidate, float64 [photos, rows, rewards].
        chosen: Index of the best candidate of each model, int [photos, models]; -1 where there is none.
    """

    labels: list[str]
    best: np.ndarray
    mean: np.ndarray
    parts: np.ndarray
    chosen: np.ndarray


def compute_totals(results: Results, function: RewardFunction) -> Totals:
    """Return the totals of all models and references for a reward function."""
    totals = total_scores(results.scores, function)  # [P, M, N]
    chosen = np.nan_to_num(totals, nan=-1.0).argmax(axis=2)
    best = np.take_along_axis(totals, chosen[..., None], 2)[..., 0]
    parts = np.take_along_axis(results.scores, chosen[..., None, None], 2)[:, :, 0]
    known = ~np.isnan(totals)
    mean = np.where(known.any(2), np.nan_to_num(totals).sum(2) / np.maximum(known.sum(2), 1), np.nan)
    labels = [model.label for model in results.config.models]
    columns, column_parts = [best], [parts]
    if results.config.is_scored:
        references = [(UNTOUCHED, results.untouched)]
        if results.config.pool:
            picked = np.nan_to_num(total_scores(results.pool, function), nan=-1.0).argmax(1)
            pool = np.take_along_axis(results.pool, picked[:, None, None], 1)[:, 0]
            references.append((BEST_OF_POOL.format(results.config.pool), pool))
        for label, scores in references:
            labels.append(label)
            columns.append(total_scores(scores, function)[:, None])
            column_parts.append(scores[:, None])
    best_of_all = np.concatenate(columns, axis=1)
    mean = np.concatenate([mean, *columns[1:]], axis=1)
    return Totals(labels, best_of_all, mean, np.concatenate(column_parts, axis=1), np.where(np.isnan(best), -1, chosen))


def leaderboard(
    results: Results, function: RewardFunction, reference: int | None = None, totals: Totals | None = None
) -> dict[str, Any]:
    """Compute the leaderboard.

    Args:
        results: The stored answers and scores.
        function: The reward weights.
        reference: Index of the row that wins are counted against; the untouched photo by default, which is the first
            row after the models, or the first model where nothing is scored.
        totals: The totals for this function, if they are known.

    Returns:
        A JSON object: `rows`, one per model and reference in the order of the config, each with `reward`, `wins` (mean,
        low, high), `mean_candidate`, `parts`, `valid`, `latency`, `latency_p95`, `tokens_in`, `tokens_out`, `cost` and
        `reward_per_cent`; None where a value is unknown or has no meaning.
    """
    totals = totals or compute_totals(results, function)
    models, rows = len(results.config.models), len(totals.labels)
    default = models if results.config.is_scored else 0
    reference = default if reference is None or not 0 <= reference < rows else reference
    wins = win_shares(totals.best, reference)
    intervals = _intervals(np.concatenate([totals.best, wins], axis=1))
    table = []
    for index, label in enumerate(totals.labels):
        row: dict[str, Any] = {
            "label": label,
            "kind": "model" if index < models else "reference",
            "reward": intervals[index],
            "mean_candidate": _mean(totals.mean[:, index]),
            "parts": {name: _mean(totals.parts[:, index, number]) for number, name in enumerate(REWARDS)},
            "wins": None if index == reference else intervals[rows + index],
            "photos": int((~np.isnan(totals.best[:, index])).sum()),
        }
        table.append(row | _call_columns(results, index if index < models else None, row["reward"]["mean"]))
    return {
        "photos": len(results.photos),
        "answered": len(results.rows),
        "candidates": results.config.candidates,
        "scored": results.config.is_scored,
        "reward": {name: weight for name, weight in function.weights.items() if weight},
        "reference": reference,
        "rows": table,
    }


def _call_columns(results: Results, model: int | None, reward: float | None) -> dict[str, Any]:
    """Return the columns about a model's calls; None for a reference, which needs no model."""
    names = ("valid", "latency", "latency_p95", "tokens_in", "tokens_out", "cost", "reward_per_cent")
    if model is None:
        return dict.fromkeys(names)
    seconds = results.seconds[:, model]
    known, cost = seconds[~np.isnan(seconds)], _mean(results.cost[:, model])
    values = (
        _mean(results.valid[:, model]),
        float(np.median(known)) if len(known) else None,
        float(np.percentile(known, 95)) if len(known) else None,
        _mean(results.tokens_in[:, model]),
        _mean(results.tokens_out[:, model]),
        cost,
        reward / (100 * cost) if reward is not None and cost else None,
    )
    return dict(zip(names, values))


def win_shares(best: np.ndarray, reference: int) -> np.ndarray:
    """Return per photo and row 1 for a higher total than the reference's, 0.5 for a tie, 0 for a lower one."""
    difference = best - best[:, reference : reference + 1]
    return np.where(np.isnan(difference), np.nan, 0.5 + 0.5 * np.sign(np.where(abs(difference) < TIE, 0, difference)))


def compare_evaluations(current: Results, earlier: Results, function: RewardFunction) -> list[dict[str, Any]]:
    """Compare the models that two evaluations have in common, paired by the photos that they have in common.

    Args:
        current: An evaluation.
        earlier: Another one.
        function: The reward weights.

    Returns:
        Per model its `label`, the number of common `photos`, and the `difference` current minus earlier (mean, low,
        high) of the best candidates' totals.
    """
    index = {photo["digest"]: number for number, photo in enumerate(earlier.photos)}
    pairs = [
        (number, index[photo["digest"]]) for number, photo in enumerate(current.photos) if photo["digest"] in index
    ]
    first, second = (compute_totals(results, function) for results in (current, earlier))
    rows = []
    for position, label in enumerate(first.labels):
        if label in second.labels:
            other = second.labels.index(label)
            values = [first.best[a, position] - second.best[b, other] for a, b in pairs]
            interval = _intervals(np.array(values, np.float64).reshape(-1, 1))[0]
            rows.append({"label": label, "photos": int((~np.isnan(values)).sum()), "difference": interval})
    return rows


def photo_order(results: Results, totals: Totals, order: str, a: int = 0, b: int = 1) -> list[int]:
    """Return indices of photos.

    Args:
        results: The evaluation.
        totals: Its totals.
        order: "photo" (all, as in the set), "disagree" (all, those first whose models differ most) or "loses" (those
            where row `a` has a lower total than row `b`, the greatest loss first).
        a: Index of a row.
        b: Index of another row.
    """
    count, models = len(results.photos), len(results.config.models)
    if order == "disagree":
        if results.config.is_scored:
            best = totals.best[:, :models]
            filled = np.where(np.isnan(best).any(1, keepdims=True), 0.0, best)
            spread = filled.max(1) - filled.min(1) if models else np.zeros(count)
        else:
            spread = np.array(
                [len({tuple(_texts(results, photo, model)) for model in range(models)}) for photo in range(count)]
            )
        return [int(index) for index in np.argsort(-spread, kind="stable")]
    if order == "loses" and results.config.is_scored:
        loss = np.nan_to_num(totals.best[:, b] - totals.best[:, a])
        return [int(index) for index in np.argsort(-loss, kind="stable") if loss[index] > TIE]
    return list(range(count))


def _texts(results: Results, photo: int, model: int) -> list[str]:
    return results.rows.get((photo, model), {}).get("texts", [])


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _intervals(columns: np.ndarray) -> list[dict[str, float | None]]:
    """Return the mean of each column [photos, columns] with its 95 % bootstrap interval over photos; NaN is ignored."""
    if not len(columns):
        return [{"mean": None, "low": None, "high": None}] * columns.shape[1]
    known = ~np.isnan(columns)
    values = np.nan_to_num(columns).astype(np.float32)
    counts = _resamples(len(columns))
    if known.all():
        low, high = np.percentile(counts @ values / np.float32(len(columns)), [2.5, 97.5], axis=0)
    else:  # resamples without a known value do not count
        weights = counts @ known.astype(np.float32)
        empty = (weights == 0) & known.any(0)
        resampled = np.where(empty, np.float32(np.nan), counts @ values / np.maximum(weights, 1))
        percentile = np.nanpercentile if empty.any() else np.percentile  # much faster
        low, high = percentile(resampled, [2.5, 97.5], axis=0)
    means = np.nan_to_num(columns).sum(0) / np.maximum(known.sum(0), 1)
    return [
        {"mean": float(means[index]), "low": float(low[index]), "high": float(high[index])}
        if known[:, index].any()
        else {"mean": None, "low": None, "high": None}
        for index in range(columns.shape[1])
    ]


@lru_cache(maxsize=8)
def _resamples(photos: int) -> np.ndarray:
    """Return how often each resample contains each photo: float32 [BOOTSTRAP_SAMPLES, photos]."""
    rng = np.random.default_rng(0)
    return rng.multinomial(photos, np.full(photos, 1 / photos), BOOTSTRAP_SAMPLES).astype(np.float32)
