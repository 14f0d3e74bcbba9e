"""Percentiles that can be merged: durations in buckets whose width grows with them, as in DDSketch (Masson 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ERROR = 0.005  # a percentile of merged buckets is at most this share away from the exact one
_LOG = np.log((1 + ERROR) / (1 - ERROR))
SIZE = int(np.ceil(np.log(2.0**62) / _LOG)) + 2


def buckets(values: np.ndarray) -> np.ndarray:
    """The bucket of each duration (whole microseconds, >= 0): 0 for 0, otherwise by its logarithm."""
    return np.where(values > 0, np.ceil(np.log(np.maximum(values, 1)) / _LOG) + 1, 0).astype(np.int16)


def quantiles(sums: np.ndarray, calls: np.ndarray, bucket: np.ndarray, shares: Sequence[float]) -> list[float | None]:
    """The values at these shares (0..1) by nearest rank (NumPy's "inverted_cdf"); None each where there is none.

    Each entry stands for `calls` values of one bucket with that sum. The mean of one bucket's values is within twice
    ERROR of each of them, and exact where `calls` is 1.
    """
    if not len(sums):
        return [None] * len(shares)
    values = sums / calls
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(calls[order].astype(np.int64))
    ranks = [max(1, int(np.ceil(share * int(reached[-1]) - 1e-9))) for share in shares]
    return [float(values[order[np.searchsorted(reached, rank)]]) for rank in ranks]
