"""Mergeable percentiles: durations in logarithmic buckets, as in DDSketch (Masson et al., 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

RELATIVE_ERROR = 0.009  # relative width of a bucket, and the largest relative error of a percentile
MAX_SORTED = 50_000  # rows that are sorted, which is exact if each is one call; more are counted by bucket
_LOG_WIDTH = np.log1p(RELATIVE_ERROR)


def bucket_index(values: np.ndarray) -> np.ndarray:
    """Return the bucket of each duration (integer microseconds, >= 0), int16: 0 for 0, else by its logarithm."""
    return np.where(values > 0, np.ceil(np.log(np.maximum(values, 1)) / _LOG_WIDTH) + 1, 0).astype(np.int16)


def grouped_quantiles(
    sums: np.ndarray, calls: np.ndarray, buckets: np.ndarray, groups: np.ndarray, count: int, shares: Sequence[float]
) -> list[list[float | None]]:
    """Compute quantiles of durations per group.

    Args:
        sums: Sum of the durations of each row, int [n].
        calls: Number of calls of each row, int [n].
        buckets: Bucket of each row's durations, int [n].
        groups: Group of each row, int [n], below `count`.
        count: Number of groups.
        shares: Quantiles to compute, 0..1.

    Returns:
        For each group the quantiles; None if the group is empty. Up to `MAX_SORTED` rows see `quantiles`; for more, the
        middle of the bucket, within `RELATIVE_ERROR` of the exact value.
    """
    if len(sums) <= MAX_SORTED:
        order = np.argsort(groups, kind="stable")
        edges = np.searchsorted(groups[order], np.arange(count + 1))
        sums, calls = sums[order], calls[order]
        return [quantiles(sums[first:last], calls[first:last], shares) for first, last in pairwise(edges)]
    buckets = buckets.astype(np.int64)
    lowest = int(buckets.min())
    width = int(buckets.max()) - lowest + 1
    weights = None if (calls == 1).all() else calls
    histogram = np.bincount(groups * width + (buckets - lowest), weights, count * width).reshape(count, width)
    cumulative = np.cumsum(histogram, axis=1).astype(np.int64)

    def middle(counts: np.ndarray, share: float) -> float | None:
        if not counts[-1]:
            return None
        bucket = lowest + int(np.searchsorted(counts, _rank(share, int(counts[-1]))))
        return float(np.exp((bucket - 1.5) * _LOG_WIDTH)) if bucket else 0.0

    return [[middle(counts, share) for share in shares] for counts in cumulative]


def quantiles(sums: np.ndarray, calls: np.ndarray, shares: Sequence[float]) -> list[float | None]:
    """Compute quantiles by nearest rank (NumPy's "inverted_cdf"); None each without calls.

    A row stands for `calls` durations of one bucket with the given sum. Its mean lies in that bucket, so the result is
    within `RELATIVE_ERROR` of the exact value, and exact if each row is one call.
    """
    if not len(sums):
        return [None] * len(shares)
    if (calls == 1).all():
        indices = [_rank(share, len(sums)) - 1 for share in shares]
        return [float(value) for value in np.partition(sums, indices)[indices]]
    means = sums / calls
    order = np.argsort(means, kind="stable")
    cumulative = np.cumsum(calls[order].astype(np.int64))
    ranks = [_rank(share, int(cumulative[-1])) for share in shares]
    return [float(means[order[np.searchsorted(cumulative, rank)]]) for rank in ranks]


def _rank(share: float, count: int) -> int:
    return max(1, int(np.ceil(share * count - 1e-9)))
