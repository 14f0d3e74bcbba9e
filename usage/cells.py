"""Cells: calls of one kind, one quarter of an hour and one bucket of latency, counted and summed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np

# Bucket -1: not known. An event that has not been rolled up is a cell of one call at its own time.
CELL = np.dtype(
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
SUMS = tuple(name for name in CELL.names or () if name not in KEY)


@dataclass(frozen=True)
class Kind:
    """What many events have in common; see Event."""

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

    @property
    def priced(self) -> bool:
        return self.cost_basis != "unknown"

    @property
    def counted(self) -> bool:
        return self.tokens_basis != "unknown"

    @property
    def estimated(self) -> bool:
        return self.cost_basis == "estimated"

    @property
    def failed(self) -> bool:
        return self.outcome == "error"


KIND_FIELDS = tuple(field.name for field in fields(Kind))


@dataclass(frozen=True, eq=False)
class Cells:
    """Cells as one array per field of CELL, and what their kinds are."""

    columns: dict[str, np.ndarray]
    kinds: dict[int, Kind]

    def __len__(self) -> int:
        return len(self.columns["kind"])

    @property
    def exact(self) -> bool:
        """Whether each cell is one call."""
        return bool((self.columns["calls"] == 1).all())

    def only(self, part: str, name: str) -> Cells:
        """The cells whose kinds have this name in this part."""
        kinds = {number: kind for number, kind in self.kinds.items() if getattr(kind, part) == name}
        mask = table(kinds)[np.minimum(self.columns["kind"], max(kinds, default=0) + 1)]
        return Cells({name: column[mask] for name, column in self.columns.items()}, kinds)


def table(kinds: Iterable[int]) -> np.ndarray:
    """Looks up whether a kind is one of these, by its number; the last entry, False, is for all higher numbers."""
    numbers = list(kinds)
    found = np.zeros(max(numbers, default=0) + 2, bool)
    found[numbers] = True
    return found


def exact_sums(places: np.ndarray, column: np.ndarray, count: int) -> np.ndarray:
    """The column of whole numbers summed by place, int64 [count], exactly: in halves where doubles would round."""
    column = column.astype(np.int64, copy=False)
    if int(np.abs(column).sum()) < 2**53:
        return np.bincount(places, column, count).astype(np.int64)
    high = np.bincount(places, column >> 31, count).astype(np.int64)
    return (high << 31) + np.bincount(places, column & (2**31 - 1), count).astype(np.int64)


def merged(rows: np.ndarray) -> np.ndarray:
    """The same with one row per key: rows that agree in KEY are added up."""
    if not len(rows):
        return rows
    order = np.lexsort([rows[name] for name in reversed(KEY)])
    rows = rows[order]
    new = np.ones(len(rows), bool)
    new[1:] = np.logical_or.reduce([rows[name][1:] != rows[name][:-1] for name in KEY])
    starts = np.flatnonzero(new)
    result = rows[starts].copy()
    for name in SUMS:
        result[name] = np.add.reduceat(rows[name], starts)
    return result
