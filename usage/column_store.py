"""Aggregated usage rows as NumPy columns: calls of one kind, time and latency bucket, counted and summed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np

# One row aggregates the calls that agree in KEY. An event that is not rolled up is a row of one call at its own time.
# Bucket -1 means unknown.
ROW = np.dtype(
    [
        ("time", "<i8"),
        ("kind", "<i4"),
        ("latency_bucket", "<i2"),
        ("first_bucket", "<i2"),
        ("rewarded", "?"),
        ("calls", "<u4"),
        *((name, "<i8") for name in ("latency", "first_token", "tokens_in", "tokens_out", "cost", "reward")),
    ]
)
KEY = ("time", "kind", "latency_bucket", "first_bucket", "rewarded")
SUMS = tuple(name for name in ROW.names or () if name not in KEY)


@dataclass(frozen=True)
class EventKind:
    """The names that many events share; see `UsageEvent`."""

    branch: str
    commit: str
    space: str
    source: str
    model: str
    adapter: str
    skill: str
    outcome: str
    error: str
    tokens_basis: str
    cost_basis: str
    payer: str

    @property
    def priced(self) -> bool:
        """Whether the cost is known."""
        return self.cost_basis != "unknown"

    @property
    def counted(self) -> bool:
        """Whether the token counts are known."""
        return self.tokens_basis != "unknown"

    @property
    def estimated(self) -> bool:
        """Whether the cost is an estimate."""
        return self.cost_basis == "estimated"

    @property
    def failed(self) -> bool:
        """Whether the call failed. A cancelled call did not."""
        return self.outcome == "error"


KIND_FIELDS = tuple(field.name for field in fields(EventKind))


@dataclass(frozen=True, eq=False)
class ColumnStore:
    """Rows of `ROW` as one array per field.

    Attributes:
        columns: Arrays of equal length by field of `ROW`.
        kinds: The kinds of the rows by id.
    """

    columns: dict[str, np.ndarray]
    kinds: dict[int, EventKind]

    def __len__(self) -> int:
        return len(self.columns["kind"])

    @property
    def exact(self) -> bool:
        """Whether each row is a single call."""
        return bool((self.columns["calls"] == 1).all())

    def only(self, field: str, name: str) -> ColumnStore:
        """Return the rows whose kind has `name` in the given field of `EventKind`."""
        kinds = {kind_id: kind for kind_id, kind in self.kinds.items() if getattr(kind, field) == name}
        mask = membership_table(kinds)[np.minimum(self.columns["kind"], max(kinds, default=0) + 1)]
        return ColumnStore({name: column[mask] for name, column in self.columns.items()}, kinds)


def membership_table(ids: Iterable[int]) -> np.ndarray:
    """Return a boolean table, indexed by id, of the given ids. Its last entry, False, stands for all higher ids."""
    indices = list(ids)
    table = np.zeros(max(indices, default=0) + 2, bool)
    table[indices] = True
    return table


def exact_sums(groups: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Sum integers by group without rounding.

    Args:
        groups: Group of each value, int [n], below `count`.
        values: Integers [n].
        count: Number of groups.

    Returns:
        Sums, int64 [count].
    """
    values = values.astype(np.int64, copy=False)
    if int(np.abs(values).sum()) < 2**53:  # np.bincount adds float64
        return np.bincount(groups, values, count).astype(np.int64)
    high = np.bincount(groups, values >> 31, count).astype(np.int64)
    return (high << 31) + np.bincount(groups, values & (2**31 - 1), count).astype(np.int64)


def merge_rows(rows: np.ndarray) -> np.ndarray:
    """Add up rows that agree in `KEY`. Returns rows sorted by `KEY`."""
    if not len(rows):
        return rows
    rows = rows[np.lexsort([rows[name] for name in reversed(KEY)])]
    is_first = np.ones(len(rows), bool)
    is_first[1:] = np.logical_or.reduce([rows[name][1:] != rows[name][:-1] for name in KEY])
    starts = np.flatnonzero(is_first)
    merged = rows[starts].copy()
    for name in SUMS:
        merged[name] = np.add.reduceat(rows[name], starts)
    return merged
