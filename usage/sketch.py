"""Percentiles that can be merged: durations in buckets whose width grows with them, as in DDSketch (Masson 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

ERROR = 0.009  # the width of a bucket: a percentile of bucketed calls is at most this share away from the exact one
MANY = 50_000  # entries; up to so many are sorted, which is exact where each is one call
_LOG = np.log1p(ERROR)


def buckets(values: np.ndarray) -> np.ndarray:
    """The bucket of each duration (whole microseconds, >= 0): 0 for 0, otherwise by its logarithm."""
    return np.where(values > 0, np.ceil(np.log(np.maximum(values, 1)) / _LOG) + 1, 0).astype(np.int16)


def grouped(
    values: np.ndarray, calls: np.ndarray, bucket: np.ndarray, groups: np.ndarray, count: int, shares: Sequence[float]
) -> list[list[float | None]]:
    """For each of `count` groups the values at these shares: see `quantiles`; beyond MANY entries from their buckets.

    groups: the group of each entry. From buckets a value is the middle of its bucket, within ERROR of the exact one.
    """
    if len(values) > MANY:
        return _from_buckets(calls, bucket.astype(np.int64), groups, count, shares)
    order = np.argsort(groups, kind="stable")
    edges = np.searchsorted(groups[order], np.arange(count + 1))
    values, calls = values[order], calls[order]
    return [quantiles(values[first:last], calls[first:last], shares) for first, last in pairwise(edges)]


def _from_buckets(
    calls: np.ndarray, bucket: np.ndarray, groups: np.ndarray, count: int, shares: Sequence[float]
) -> list[list[float | None]]:
    low = int(bucket.min())
    width = int(bucket.max()) - low + 1
    weights = None if (calls == 1).all() else calls
    table = np.bincount(groups * width + (bucket - low), weights, count * width).reshape(count, width)
    reached = np.cumsum(table, axis=1).astype(np.int64)
    return [
        [_middle(low + int(np.searchsorted(row, _rank(share, int(row[-1]))))) if row[-1] else None for share in shares]
        for row in reached
    ]


def _middle(bucket: int) -> float:
    return float(np.exp((bucket - 1.5) * _LOG)) if bucket else 0.0


def quantiles(sums: np.ndarray, calls: np.ndarray, shares: Sequence[float]) -> list[float | None]:
    """The values at these shares (0..1) by nearest rank (NumPy's "inverted_cdf"); None each where there is none.

    Each entry stands for `calls` values of one bucket with that sum. Their mean lies in their bucket, so the entry
    that is found is of the right bucket and within ERROR of the exact value, which it is where `calls` is 1.
    """
    if not len(sums):
        return [None] * len(shares)
    if (calls == 1).all():
        places = [_rank(share, len(sums)) - 1 for share in shares]
        return [float(value) for value in np.partition(sums, places)[places]]
    values = sums / calls
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(calls[order].astype(np.int64))
    ranks = [_rank(share, int(reached[-1])) for share in shares]
    return [float(values[order[np.searchsorted(reached, rank)]]) for rank in ranks]


def _rank(share: float, count: int) -> int:
    return max(1, int(np.ceil(share * count - 1e-9)))
