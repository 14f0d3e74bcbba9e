"""From the database to cells: the events of a span of time, whatever lies beneath."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sqlalchemy import Connection, select

from usage.cells import CELL, KIND_FIELDS, Cells, Kind
from usage.database import Database
from usage.sketch import buckets
from usage.tables import EVENTS, KINDS

COLUMNS = ("time", "kind", "latency", "first_token", "tokens_in", "tokens_out", "cost", "reward")


class Reader:
    """Reads cells."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def kinds(self) -> dict[int, Kind]:
        """Every kind that there is, by its number."""
        with self.database.transaction() as connection:
            return read_kinds(connection)

    def cells(self, start: int, end: int, meant: Callable[[Kind], bool]) -> Cells:
        """The cells of the events from `start` up to `end` (microseconds since 1970) whose kind is meant."""
        with self.database.transaction() as connection:
            kinds = {number: kind for number, kind in read_kinds(connection).items() if meant(kind)}
            rows = read_events(connection, start, end)
        return Cells(rows[np.isin(rows["kind"], list(kinds))], kinds)


def read_kinds(connection: Connection) -> dict[int, Kind]:
    """Every kind that there is, by its number."""
    rows = connection.execute(select(KINDS.c.id, *(KINDS.c[name] for name in KIND_FIELDS))).all()
    return {number: Kind(*words) for number, *words in rows}


def read_events(connection: Connection, start: int, end: int) -> np.ndarray:
    """The events from `start` up to `end` as cells of one call each."""
    query = select(*(EVENTS.c[name] for name in COLUMNS)).where(EVENTS.c.time >= start, EVENTS.c.time < end)
    return cells_of(connection.execute(query).all())


def cells_of(events: Sequence[Any]) -> np.ndarray:
    """Rows of COLUMNS as cells of one call each, at their own time."""
    rows = np.zeros(len(events), CELL)
    if len(events):
        for name, values in zip(COLUMNS, zip(*events, strict=True), strict=True):
            rows[name] = [0 if value is None else value for value in values]
        known = np.array([row.first_token is not None for row in events])
        rows["rewarded"] = [row.reward is not None for row in events]
        rows["latency_bucket"] = buckets(rows["latency"])
        rows["first_bucket"] = np.where(known, buckets(rows["first_token"]), -1)
        rows["calls"] = 1
    return rows
