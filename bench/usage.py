"""Usage: a million calls in 30 days, what the dashboard takes for each filter, and what recording one more costs.

PostgreSQL is measured where TEST_DATABASE_URL names a server; in a schema of its own, which is dropped afterwards.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import insert, text

from storage.database import Database
from storage.tables import EVENTS, HOURS, KINDS
from usage import rollups
from usage.analytics import UsageAnalytics
from usage.events import Deployment, UsageEvent
from usage.recorder import Recorder
from usage.time_window import UsageFilter, micros

EVENTS_IN_ALL = int(os.environ.get("BENCH_USAGE_EVENTS", "1_000_000"))
DAYS, BRANCHES, MODELS = 30, 10, 6
SKILLS = ("recipe", "query", "caption", "detect", "point")
OUTCOMES = (("ok", ""), ("error", "out_of_memory"), ("error", "provider"), ("cancelled", ""))
NOW = datetime(2026, 11, 1, 12, 34, 56, tzinfo=timezone.utc)
REPEATS = 20
FILTERS = {
    "hour": UsageFilter("hour"),
    "day": UsageFilter("day"),
    "week": UsageFilter("week"),
    "30 days": UsageFilter("30 days"),
    "30 days, New York": UsageFilter("30 days", zone="America/New_York"),
    "30 days, Kathmandu (+5:45)": UsageFilter("30 days", zone="Asia/Kathmandu"),
    "30 days, three branches": UsageFilter("30 days", branches=("branch-0", "branch-1", "branch-2")),
    "30 days, one model": UsageFilter("30 days", models=("model-3",)),
    "30 days, one skill": UsageFilter("30 days", skills=("detect",)),
    "30 days, errors": UsageFilter("30 days", outcomes=("error",)),
    "custom, ten days to the second": UsageFilter(
        "custom", start=NOW - timedelta(days=17, seconds=77), end=NOW - timedelta(days=7, seconds=1)
    ),
}


def rows() -> list[dict[str, Any]]:
    """The dashboard's times on each database, and the recorder's."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        found += _measured(f"sqlite:///{folder}/usage.sqlite3", "SQLite")
        found += _recording(Path(folder))
    if os.environ.get("TEST_DATABASE_URL"):
        with _schema(os.environ["TEST_DATABASE_URL"]) as url:
            found += _measured(url, "PostgreSQL")
    return found


def fill(database: Database, count: int, now: datetime = NOW) -> None:
    """Writes `count` events of the last 30 days: busy days and quiet nights, long tails, prices for half the models."""
    draw = np.random.default_rng(4)
    kinds = [
        (branch, model, skill, outcome)
        for branch in range(BRANCHES)
        for model in range(MODELS)
        for skill in SKILLS
        for outcome in OUTCOMES
    ]
    weights = np.array([0.96 if kind[3][0] == "ok" else 0.04 / 3 for kind in kinds]) / (BRANCHES * MODELS * len(SKILLS))
    with database.transaction(write=True) as connection:
        connection.execute(insert(KINDS), [_kind(number, *kind) for number, kind in enumerate(kinds, 1)])
    ages = draw.beta(1.0, 1.2, count) * DAYS * 86_400e6
    times = np.sort(micros(now) - ages.astype(np.int64))
    kind = draw.choice(len(kinds), count, p=weights / weights.sum()) + 1
    latency = draw.lognormal(13.5, 0.9, count).astype(np.int64)
    tokens = draw.integers(735, 900, count), draw.integers(10, 120, count)
    for place in range(0, count, 20_000):
        span = slice(place, place + 20_000)
        columns = (times, kind, latency, *tokens)
        values = [_event(*map(int, one), kinds=kinds) for one in zip(*(c[span] for c in columns), strict=True)]
        with database.transaction(write=True) as connection:
            connection.execute(insert(EVENTS), values)
    hours = np.unique(times - times % rollups.HOUR)
    with database.transaction(write=True) as connection:
        marks = [{"hour": int(hour), "changes": 1, "built": -1, "sealed": False} for hour in hours]
        connection.execute(insert(HOURS), marks)


def _kind(number: int, branch: int, model: int, skill: str, outcome: tuple[str, str]) -> dict[str, Any]:
    words = {"branch": f"branch-{branch}", "model": f"model-{model}", "skill": skill}
    rest = {"commit": "c" * 40, "space": "", "source": "playground", "adapter": "", "tokens_basis": "reported"}
    ended = {"outcome": outcome[0], "error": outcome[1], "cost_basis": "estimated" if model < 3 else "unknown"}
    return {"id": number, "digest": f"{number:064d}", **words, **rest, **ended}


def _event(when: int, kind: int, latency: int, came: int, went: int, kinds: list[Any]) -> dict[str, Any]:
    _, model, skill, _ = kinds[kind - 1]
    return {
        "id": uuid.uuid4().hex,
        "time": when,
        "kind": kind,
        "latency": latency,
        "first_token": latency // 3,
        "queue": 1000,
        "tokens_in": came,
        "tokens_out": went,
        "cost": came * 300 + went * 1000 if model < 3 else None,
        "reward": 400_000 + went * 1000 if skill == "recipe" else None,
        "candidates": 4,
        "request": "",
        "session": "",
    }


def _measured(url: str, name: str) -> list[dict[str, Any]]:
    database = Database(url)
    fill(database, EVENTS_IN_ALL)
    started = time.perf_counter()
    while rollups.build(database, 100, micros(NOW)):
        pass
    built = time.perf_counter() - started
    plain = statistics.median(_timed(lambda: _plain(database)) for _ in range(3))
    started = time.perf_counter()
    UsageAnalytics(database).dashboard(UsageFilter("30 days"), now=NOW)
    cold = time.perf_counter() - started
    usage, found = UsageAnalytics(database), []
    for title, wanted in FILTERS.items():
        usage.dashboard(wanted, now=NOW)
        times = sorted(_timed(partial(usage.dashboard, wanted, now=NOW)) for _ in range(REPEATS))
        found.append(_row(f"dashboard, {title}, {name}", 1000 * times[-2], plain, "p95 of 20, all charts and figures"))
    database.close()
    unit = {"baseline": None, "ratio": None, "target": None}
    found.append({"name": f"first look, {name}", "value": 1000 * cold, "unit": "ms", **unit, "note": "nothing cached"})
    note = f"{EVENTS_IN_ALL:,} events"
    return [*found, {"name": f"roll-ups, {name}", "value": built, "unit": "s", **unit, "note": note}]


def _row(name: str, value: float, plain: float, note: str) -> dict[str, Any]:
    ratio = 1000 * plain / value
    note += "; baseline: counts, sums and percentiles of 30 days by plain SQL on the events"
    rest = {"baseline": 1000 * plain, "ratio": ratio, "target": "<= 300", "note": note}
    return {"name": name, "value": value, "unit": "ms", **rest}


def _plain(database: Database) -> None:
    """The same questions put to the events in plain SQL: by day and branch, by model, and the percentiles."""
    queries = (
        """SELECT e.time / 86400000000, k.branch, count(*), sum(e.cost), sum(e.tokens_in + e.tokens_out)
           FROM usage_events e JOIN usage_kinds k ON k.id = e.kind GROUP BY 1, 2""",
        "SELECT k.model, count(*), sum(e.cost) FROM usage_events e JOIN usage_kinds k ON k.id = e.kind GROUP BY 1",
        "SELECT latency FROM usage_events ORDER BY latency LIMIT 1 OFFSET (SELECT count(*) / 2 FROM usage_events)",
    )
    with database.transaction() as connection:
        for query in queries:
            connection.execute(text(query)).all()


def _recording(folder: Path) -> list[dict[str, Any]]:
    database = Database(f"sqlite:///{folder}/recording.sqlite3")
    recorder = Recorder(database, folder / "spool", Deployment())
    recorder.start()
    rate, seconds = 6_000, 10
    taken, started = [], time.perf_counter()
    for number in range(rate * seconds):
        before = time.perf_counter()
        recorder.record(UsageEvent(datetime.now(timezone.utc), f"model-{number % 6}", "recipe", latency=0.5))
        taken.append(time.perf_counter() - before)
        time.sleep(max(0.0, started + (number + 1) / rate - time.perf_counter()))
    offered = len(taken) / (time.perf_counter() - started)
    recorder.flush()
    sustained = len(taken) / (time.perf_counter() - started)
    recorder.close()
    with database.transaction() as connection:
        kept = connection.execute(text("SELECT count(*) FROM usage_events")).scalar_one()
    p99 = 1000 * sorted(taken)[int(0.99 * len(taken))]
    note = f"{kept:,} of {len(taken):,} in the database, {recorder.lost} lost; offered {offered:,.0f}/s"
    rest = {"baseline": None, "ratio": None}
    return [
        {
            "name": "recording, sustained",
            "value": sustained,
            "unit": "events/s",
            **rest,
            "target": ">= 5000",
            "note": note,
        },
        {"name": "recording, added per call, p99", "value": p99, "unit": "ms", **rest, "target": "<= 1", "note": ""},
    ]


def _timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@contextmanager
def _schema(server: str) -> Iterator[str]:
    database, name = Database(server), f"bench_{uuid.uuid4().hex}"
    with database._engine.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {name}"))
    try:
        yield f"{server}{'&' if '?' in server else '?'}options=-csearch_path%3D{name}"
    finally:
        with database._engine.begin() as connection:
            connection.execute(text(f"DROP SCHEMA {name} CASCADE"))
        database.close()
