"""Writing events into the database, each exactly once, however often it is delivered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, select

from storage.database import Database
from storage.tables import BASES, EVENTS, HOURS, KINDS, WORDS
from usage.events import Event
from usage.time_window import HOUR, SECOND, micros

DOLLAR = 1_000_000_000
MILLION = 1_000_000
CHUNK = 500  # names per query


def add(database: Database, events: Sequence[Event]) -> None:
    """Write events; those that are there already are left alone. Raises StoreError.

    One transaction: either all are there afterwards or none. The hours that they fall into are marked as changed in
    the same transaction, so that no roll-up is taken for true that has not seen them.
    """
    if not events:
        return
    with database.transaction(write=True) as connection:
        kinds = _kinds(database, connection, events)
        # The order keeps two writers from waiting for each other in a circle.
        rows = sorted((_row(event, kinds[_words(event)]) for event in events), key=lambda row: row["id"])
        connection.execute(database.insert(EVENTS).on_conflict_do_nothing(index_elements=["id"]), rows)
        for hour in sorted({row["time"] - row["time"] % HOUR for row in rows}):
            mark = database.insert(HOURS).values(hour=hour, changes=1, built=-1, sealed=False)
            changed = {"changes": HOURS.c.changes + 1}
            connection.execute(mark.on_conflict_do_update(index_elements=["hour"], set_=changed))


def _words(event: Event) -> tuple[str, ...]:
    return tuple(getattr(event, name) for name in (*WORDS, *BASES))


def digest(*words: str) -> str:
    """A name of fixed length for names of any length."""
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def _kinds(database: Database, connection: Connection, events: Sequence[Event]) -> dict[tuple[str, ...], int]:
    """The number of each event's kind; new kinds are added."""
    wanted = {digest(*words): words for words in {_words(event) for event in events}}
    known = _numbers(connection, sorted(wanted))
    missing = sorted(wanted.keys() - known)
    for name in missing:
        values = {"digest": name, **dict(zip((*WORDS, *BASES), wanted[name], strict=True))}
        connection.execute(database.insert(KINDS).values(values).on_conflict_do_nothing(index_elements=["digest"]))
    known |= _numbers(connection, missing)
    return {words: known[name] for name, words in wanted.items()}


def _numbers(connection: Connection, digests: list[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for place in range(0, len(digests), CHUNK):
        query = select(KINDS.c.digest, KINDS.c.id).where(KINDS.c.digest.in_(digests[place : place + CHUNK]))
        found |= {row.digest: row.id for row in connection.execute(query)}
    return found


def _row(event: Event, kind: int) -> dict[str, Any]:
    return {
        "id": event.id,
        "time": micros(event.time),
        "kind": kind,
        "latency": round(event.latency * SECOND),
        "first_token": _scaled(event.first_token, SECOND),
        "queue": _scaled(event.queue, SECOND),
        "tokens_in": event.tokens_in,
        "tokens_out": event.tokens_out,
        "cost": _scaled(event.cost, DOLLAR),
        "reward": _scaled(event.reward, MILLION),
        "candidates": event.candidates,
        "request": event.request_id,
        "session": event.session,
    }


def _scaled(value: float | None, one: int) -> int | None:
    return None if value is None else round(value * one)
