"""Usage: time of the dashboard over a million calls in 30 days, per filter, and of recording a call.

The baseline of each dashboard is the same question in plain SQL on the database that the events are recorded in.
PostgreSQL is measured if TEST_DATABASE_URL names a server, in temporary schemas. With more than a million events, which
BENCH_USAGE_EVENTS sets, only the dashboard of 30 days is measured.
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
from storage.tables import EVENTS, HOUR, HOURS, KINDS
from usage.analytics import UsageAnalytics, conditions
from usage.events import Deployment, UsageEvent
from usage.recorder import Recorder
from usage.time_window import UsageFilter, bin_starts, to_micros

EVENT_COUNT = int(os.environ.get("BENCH_USAGE_EVENTS", "1_000_000"))
DAYS, BRANCHES, MODELS = 30, 10, 6
SKILLS = ("recipe", "query", "caption", "detect", "point")
OUTCOMES = (("ok", ""), ("error", "out_of_memory"), ("error", "provider"), ("cancelled", ""))
NOW = datetime(2026, 11, 1, 12, 34, 56, tzinfo=timezone.utc)
REPEATS = 20
IS_LARGE = EVENT_COUNT > 1_000_000
TARGETS = (
    {"30 days": "<= 1000"} if IS_LARGE else {"30 days": "<= 120", "day": "<= 60", "first": "<= 300", "build": "<= 8"}
)
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
    """Measure the dashboard and the recorder on each database."""
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        table += _measure(f"sqlite:///{folder}/usage.sqlite3", f"sqlite:///{folder}/recording.sqlite3", "SQLite")
    if server := os.environ.get("TEST_DATABASE_URL"):
        with _temporary_schema(server) as url, _temporary_schema(server) as recording_url:
            table += _measure(url, recording_url, "PostgreSQL")
    return table


def _measure(url: str, recording_url: str, name: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        table = _measure_dashboard(url, name, Path(folder))
        return table if IS_LARGE else table + _measure_recorder(recording_url, name, Path(folder))


def fill(database: Database, count: int, now: datetime = NOW) -> None:
    """Insert `count` events of the last 30 days, with long-tailed latencies and prices for half of the models."""
    rng = np.random.default_rng(4)
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
    ages = rng.beta(1.0, 1.2, count) * DAYS * 86_400e6
    times = np.sort(to_micros(now) - ages.astype(np.int64))
    kind = rng.choice(len(kinds), count, p=weights / weights.sum()) + 1
    latency = rng.lognormal(13.5, 0.9, count).astype(np.int64)
    tokens = rng.integers(735, 900, count), rng.integers(10, 120, count)
    for start in range(0, count, 20_000):
        span = slice(start, start + 20_000)
        columns = (times, kind, latency, *tokens)
        values = [_event(*map(int, row), kinds=kinds) for row in zip(*(c[span] for c in columns), strict=True)]
        with database.transaction(write=True) as connection:
            connection.execute(insert(EVENTS), values)
    with database.transaction(write=True) as connection:
        rows = [{"hour": int(hour), "changes": 1} for hour in np.unique(times - times % HOUR)]
        connection.execute(insert(HOURS), rows)


def _kind(number: int, branch: int, model: int, skill: str, outcome: tuple[str, str]) -> dict[str, Any]:
    labels = {"branch": f"branch-{branch}", "model": f"model-{model}", "skill": skill}
    rest = {"commit": "c" * 40, "space": "", "source": "playground", "adapter": "", "tokens_basis": "reported"}
    result = {"outcome": outcome[0], "error": outcome[1], "cost_basis": "estimated" if model < 3 else "unknown"}
    return {"id": number, "digest": f"{number:064d}", **labels, **rest, **result}


def _event(time: int, kind: int, latency: int, tokens_in: int, tokens_out: int, kinds: list[Any]) -> dict[str, Any]:
    _, model, skill, _ = kinds[kind - 1]
    return {
        "id": uuid.uuid4().hex,
        "time": time,
        "kind": kind,
        "latency": latency,
        "first_token": latency // 3,
        "queue": 1000,
        "tokens_in": tokens_in,
        "tokens_out": tokens_out,
        "cost": tokens_in * 300 + tokens_out * 1000 if model < 3 else None,
        "reward": 400_000 + tokens_out * 1000 if skill == "recipe" else None,
        "candidates": 4,
        "request": "",
        "session": "",
    }


def _measure_dashboard(url: str, name: str, folder: Path) -> list[dict[str, Any]]:
    database = Database(url)
    fill(database, EVENT_COUNT)
    started, used = time.perf_counter(), time.process_time()
    usage = UsageAnalytics(database, folder)
    usage.options()
    seconds = time.perf_counter() - started
    table = [_row(f"building the cache, {name}", seconds, "s", TARGETS.get("build"), _cpu(used))]
    usage.cache.close()
    usage = UsageAnalytics(database, folder)
    started, used = time.perf_counter(), time.process_time()
    usage.dashboard(UsageFilter("30 days"), now=NOW)
    first = 1000 * (time.perf_counter() - started)
    note = f"with the cache on disk; {_cpu(used)}"
    table.append(_row(f"first dashboard after a restart, {name}", first, "ms", TARGETS.get("first"), note))
    for title, usage_filter in ({"30 days": FILTERS["30 days"]} if IS_LARGE else FILTERS).items():
        dashboard = partial(usage.dashboard, usage_filter, now=NOW)
        used = time.process_time()
        times = sorted(_seconds(dashboard) for _ in range(REPEATS))
        cpu = 1000 * (time.process_time() - used) / REPEATS
        baseline = _seconds(partial(_plain_sql, database, usage_filter))
        note = f"p95 of {REPEATS}, median {1000 * statistics.median(times):.0f} ms, processor {cpu:.0f} ms"
        target = TARGETS["day" if usage_filter.period in ("hour", "day") else "30 days"]
        table.append(_row(f"dashboard, {title}, {name}", 1000 * times[-2], "ms", target, note, 1000 * baseline))
    usage.cache.close()
    database.close()
    return table


def _row(
    name: str, value: float, unit: str, target: str | None, note: str = "", baseline: float | None = None
) -> dict[str, Any]:
    ratio = baseline / value if baseline else None
    row = {"name": name, "value": value, "unit": unit, "baseline": baseline, "ratio": ratio, "target": target}
    return {**row, "note": note}


def _cpu(used: float) -> str:
    return f"processor {time.process_time() - used:.1f} s"


def _plain_sql(database: Database, usage_filter: UsageFilter) -> None:
    """Answer the same questions as the dashboard in standard SQL on the events themselves."""
    window = usage_filter.window(NOW)
    starts = bin_starts(window, usage_filter.zone)
    edges = ", ".join(
        f"({index}, {to_micros(start)}, {to_micros(end)})"
        for index, (start, end) in enumerate(zip(starts, [*starts[1:], window.end], strict=True))
    )
    condition, names = conditions(usage_filter)
    for column, selected in names.items():
        condition = condition.replace(f"SELECT unnest(${column})", ", ".join(f"'{name}'" for name in selected))
    condition = condition.replace("SELECT kind FROM kinds", "SELECT id FROM usage_kinds") if names else "1 = 1"
    first, middle, end = (to_micros(moment) for moment in (window.previous.start, window.start, window.end))
    events = f"""(SELECT e.*, k.branch, k.model, k.outcome, k.error, e.time >= {middle} AS is_current
        FROM usage_events e JOIN usage_kinds k ON k.id = e.kind
        WHERE e.time >= {first} AND e.time < {end} AND {condition}) AS events"""
    join = f"JOIN (VALUES {edges}) AS bins ON time >= column2 AND time < column3"
    sums = "count(*), sum(cost), count(cost), sum(tokens_in + tokens_out), sum(reward), count(reward)"

    def percentiles(group: str, joined: str = "", value: str = "latency") -> str:
        return f"""SELECT name, value FROM (
            SELECT {group} AS name, {value} AS value, row_number() OVER (PARTITION BY {group} ORDER BY {value}) AS rank,
                count(*) OVER (PARTITION BY {group}) AS calls FROM {events} {joined} WHERE {value} IS NOT NULL
        ) AS ranked WHERE rank IN ((calls + 1) / 2, (95 * calls + 99) / 100, (99 * calls + 99) / 100)"""

    queries = [
        f"SELECT is_current, {sums} FROM {events} GROUP BY 1",
        percentiles("is_current"),
        percentiles("is_current", value="first_token"),
        f"SELECT column1, branch, count(*), sum(cost) FROM {events} {join} GROUP BY 1, 2",
        percentiles("column1", join),
        f"SELECT model, {sums} FROM {events} WHERE is_current GROUP BY 1",
        percentiles("model"),
        f"SELECT error, count(*) FROM {events} WHERE is_current AND outcome = 'error' GROUP BY 1",
    ]
    with database.transaction() as connection:
        for query in queries:
            connection.execute(text(query)).all()


def _measure_recorder(url: str, name: str, folder: Path) -> list[dict[str, Any]]:
    database = Database(url)
    recorder = Recorder(database, folder / "spool", Deployment())
    recorder.start()
    rate, seconds = 6_000, 10
    durations, started = [], time.perf_counter()
    for number in range(rate * seconds):
        before = time.perf_counter()
        recorder.record(UsageEvent(datetime.now(timezone.utc), f"model-{number % 6}", "recipe", latency=0.5))
        durations.append(time.perf_counter() - before)
        time.sleep(max(0.0, started + (number + 1) / rate - time.perf_counter()))
    offered = len(durations) / (time.perf_counter() - started)
    recorder.flush()
    sustained = len(durations) / (time.perf_counter() - started)
    recorder.close()
    with database.transaction() as connection:
        stored = connection.execute(text("SELECT count(*) FROM usage_events")).scalar_one()
    database.close()
    p99 = 1000 * sorted(durations)[int(0.99 * len(durations))]
    note = f"{stored:,} of {len(durations):,} in the database, {recorder.lost} lost; offered {offered:,.0f}/s"
    return [
        _row(f"recording, sustained, {name}", sustained, "events/s", ">= 5000", note),
        _row(f"recording, added per call, p99, {name}", p99, "ms", "<= 1"),
    ]


def _seconds(action: Any) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


@contextmanager
def _temporary_schema(server: str) -> Iterator[str]:
    database, name = Database(server), f"bench_{uuid.uuid4().hex}"
    with database._engine.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {name}"))
    try:
        yield f"{server}{'&' if '?' in server else '?'}options=-csearch_path%3D{name}"
    finally:
        with database._engine.begin() as connection:
            connection.execute(text(f"DROP SCHEMA {name} CASCADE"))
        database.close()
