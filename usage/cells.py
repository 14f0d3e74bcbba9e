"""Cells: calls of one kind, one quarter of an hour and one bucket of latency, counted and summed."""

from __future__ import annotations

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
    """Rows of CELL, and what their kinds are."""

    rows: np.ndarray
    kinds: dict[int, Kind]

    @property
    def exact(self) -> bool:
        """Whether each cell is one call, so that percentiles are exact."""
        return bool((self.rows["calls"] == 1).all())

    def where(self, mask: np.ndarray) -> Cells:
        """Some of the rows."""
        return Cells(self.rows[mask], self.kinds)

    def flag(self, name: str) -> np.ndarray:
        """For each row, a yes or no of its kind."""
        return self._of_kinds({kind for kind, words in self.kinds.items() if getattr(words, name)})

    def only(self, part: str, name: str) -> Cells:
        """The rows whose kinds have this name in this part."""
        return self.where(self._of_kinds({kind for kind, words in self.kinds.items() if getattr(words, part) == name}))

    def split(self, part: str) -> list[tuple[str, Cells]]:
        """The rows by the name that their kinds have in this part, by name."""
        there = {int(kind) for kind in np.unique(self.rows["kind"])}
        names = sorted({getattr(self.kinds[kind], part) for kind in there})
        return [(name, self.only(part, name)) for name in names]

    def _of_kinds(self, ids: set[int]) -> np.ndarray:
        return np.isin(self.rows["kind"], np.fromiter(ids, np.int32, len(ids)))


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
