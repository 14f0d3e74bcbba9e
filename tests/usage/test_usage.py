"""Usage on both databases: figures against plain NumPy, roll-ups against events, delivery, hostile names, prices."""

import csv
import io
import json
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from storage.database import Database, StoreError
from usage import ledger, rollups
from usage.analytics import Usage
from usage.budgets import Budget, BudgetExceeded, Budgets
from usage.events import Deployment, Event
from usage.export import export
from usage.prices import Prices
from usage.recorder import Recorder
from usage.sketch import ERROR, buckets, grouped
from usage.time_window import PERIODS, Filter, bins, micros

ROOT = Path(__file__).resolve().parents[2]
NOW = datetime(2026, 3, 31, 12, 34, 56, tzinfo=timezone.utc)  # DST has begun in Europe, a month ends
ZONES = ("UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Asia/Kathmandu", "Australia/Lord_Howe")
HOSTILE = ("<script>alert(1)</script>", "'; DROP TABLE usage_events; --", "خيال", "x" * 10_000, "a\x00b", "=1+1")


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    """An empty database of each kind."""
    file = f"sqlite:///{tmp_path / 'usage.sqlite3'}"
    return Database(file if request.param == "sqlite" else request.getfixturevalue("postgres_url"))


@st.composite
def events(draw: st.DrawFn) -> Event:
    """Any event of the two months before NOW."""
    outcome = draw(st.sampled_from(("ok", "error", "cancelled")))
    cost = draw(st.none() | st.integers(0, 10**9).map(lambda nano: nano / 10**9))
    return Event(
        NOW - timedelta(microseconds=draw(st.integers(1, 60 * 86_400 * 10**6))),
        draw(st.sampled_from(("m1", "m2"))),
        draw(st.sampled_from(("recipe", "query"))),
        outcome,
        draw(st.integers(0, 10**8)) / 10**6,
        branch=draw(st.sampled_from(("main", "other"))),
        error="failed" if outcome == "error" else "",
        first_token=draw(st.none() | st.integers(0, 10**7).map(lambda us: us / 10**6)),
        cost=cost,
        cost_basis="unknown" if cost is None else "estimated",
        reward=draw(st.none() | st.integers(0, 10**6).map(lambda millionths: millionths / 10**6)),
    )


def percentile(values: list[float], share: float) -> float | None:
    return float(np.quantile(values, share, method="inverted_cdf")) if values else None


def empty(database: Database) -> None:
    with database.transaction(write=True) as connection:
        for table in ("usage_events", "usage_hours", "usage_kinds"):
            connection.execute(text(f"DELETE FROM {table}"))


@st.composite
def filters(draw: st.DrawFn) -> Filter:
    """A filter of any zone: a period that ends now, or any other one, from some microseconds to more than a year."""
    zone, branches = draw(st.sampled_from(ZONES)), draw(st.sampled_from(((), ("main",), ("main", "other"))))
    period = draw(st.sampled_from(("hour", "day", "week", "30 days", "custom")))
    if period != "custom":
        return Filter(period, branches, zone=zone)
    start = (NOW - timedelta(days=61)).replace(tzinfo=None) + timedelta(seconds=draw(st.integers(-(10**7), 5 * 10**6)))
    length = timedelta(microseconds=draw(st.sampled_from((1, 10**9, 10**11, 10**12, 10**13, 4 * 10**13))))
    return Filter(period, branches, zone=zone, start=start, end=start + length)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(made=st.lists(events(), max_size=40), wanted=filters())
def test_figures_and_series_equal_a_plain_computation(database: Database, made: list[Event], wanted: Filter) -> None:
    empty(database)
    ledger.add(database, made)
    zone, branches = wanted.zone, wanted.branches
    window = wanted.window(NOW)
    meant = [e for e in made if window.start <= e.time < window.end and (not branches or e.branch in branches)]
    raw = Usage(database).dashboard(wanted, now=NOW)
    rollups.build(database, 2_000, micros(NOW))
    rolled = Usage(database).dashboard(wanted, now=NOW)
    assert raw == rolled
    found = raw.figures
    assert found.calls.value == len(meant) and found.percentile_error == 0.0
    for name, share in {"p50": 0.5, "p95": 0.95, "p99": 0.99}.items():
        assert getattr(found, name).value == percentile([e.latency for e in meant], share)
    assert found.first_token.value == percentile([e.first_token for e in meant if e.first_token is not None], 0.5)
    costs = [e.cost for e in meant if e.cost is not None]
    assert found.cost.value == (pytest.approx(sum(costs), abs=1e-9) if costs else None)
    assert found.unpriced == len(meant) - len(costs)
    both = [(e.reward, e.cost) for e in meant if e.reward is not None and e.cost is not None]
    spent = sum(cost for _, cost in both)
    assert found.reward_per_cent.value == (
        pytest.approx(sum(reward for reward, _ in both) / (100 * spent)) if spent else None
    )
    before = [
        e for e in made if window.before.start <= e.time < window.start and (not branches or e.branch in branches)
    ]
    assert found.calls.before == len(before)
    starts = bins(window, zone)
    assert len(starts) <= 200
    place = np.searchsorted([s.timestamp() for s in starts], [e.time.timestamp() for e in meant], side="right") - 1
    for line in raw.volume.lines:
        mine = [p for p, e in zip(place, meant, strict=True) if e.branch == line.name]
        assert list(line.values) == np.bincount(np.array(mine, int), minlength=len(starts)).tolist()
    for line in raw.latency.lines:
        share = {"p50": 0.5, "p95": 0.95, "p99": 0.99}[line.name]
        by_bin = [[e.latency for p, e in zip(place, meant, strict=True) if p == n] for n in range(len(starts))]
        assert list(line.values) == [percentile(values, share) for values in by_bin]


def test_both_databases_give_the_same_numbers(tmp_path: Path, postgres_url: str) -> None:
    random = np.random.default_rng(4)
    made = [
        Event(
            NOW - timedelta(seconds=float(random.uniform(1, 40 * 86_400))),
            str(random.choice(["m1", "m2", "m3"])),
            "recipe",
            latency=float(random.lognormal(-1, 1)),
            branch=str(random.choice(["main", "feat/x", "شجرة"])),
            cost=float(random.uniform(0, 0.01)),
            cost_basis="estimated",
            reward=float(random.uniform()),
        )
        for _ in range(3_000)
    ]
    told = []
    for url in (f"sqlite:///{tmp_path / 'usage.sqlite3'}", postgres_url):
        database = Database(url)
        ledger.add(database, made)
        rollups.build(database, 500, micros(NOW))
        told.append([Usage(database).dashboard(Filter(period, zone="America/New_York"), now=NOW) for period in PERIODS])
    assert told[0] == told[1]


@pytest.mark.parametrize("zone", ZONES)
def test_days_follow_the_clock_on_the_wall_and_meet_without_gap(zone: str) -> None:
    window = Filter("30 days", zone=zone).window(NOW)
    starts = bins(window, zone)
    assert starts[0] <= window.start and starts[-1] < window.end and starts == sorted(set(starts))
    assert all(start.astimezone(ZoneInfo(zone)).hour == 0 and micros(start) % rollups.QUARTER == 0 for start in starts)


def test_retired_hours_keep_their_figures_and_take_late_events(database: Database) -> None:
    old = NOW - timedelta(days=100)
    at = old.replace(minute=5, second=0)
    ledger.add(database, [Event(at + timedelta(seconds=n), "m", "recipe", latency=n / 10) for n in range(50)])
    window = Filter("custom", start=at.replace(minute=0), end=at.replace(minute=0) + timedelta(hours=3))
    before = Usage(database).figures(window)
    assert rollups.retire(database, 10, micros(NOW - rollups.RETENTION)) == 1
    with database.transaction() as connection:
        assert connection.execute(text("SELECT count(*) FROM usage_events")).scalar() == 0
    assert Usage(database).figures(window) == before
    ledger.add(database, [Event(at, "m", "recipe", latency=9.0)])
    assert Usage(database).figures(window).calls.value == 51
    rollups.build(database, 10, micros(NOW))
    assert Usage(database).figures(window).calls.value == 51


def test_percentiles_from_buckets_are_within_the_stated_error() -> None:
    values = np.random.default_rng(1).lognormal(13, 2, 200_000).astype(np.int64)
    (found,) = grouped(values, np.ones(len(values)), buckets(values), np.zeros(len(values), int), 1, [0.5, 0.95, 0.99])
    exact = np.quantile(values, [0.5, 0.95, 0.99], method="inverted_cdf")
    assert np.abs(np.array(found, float) / exact - 1).max() <= ERROR < 0.01


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_are_kept_filtered_and_exported(database: Database, name: str) -> None:
    ledger.add(database, [Event(NOW, name, "recipe", branch=name), Event(NOW, "m", "recipe")])
    wanted = Filter(branches=(name,))
    later = NOW + timedelta(seconds=1)
    assert Usage(database).figures(wanted, now=later).calls.value == 1
    assert Usage(database).recent(wanted, now=later)[0].branch == name.replace("\x00", "\ufffd")
    (row,) = csv.DictReader(io.StringIO(b"".join(export(database, wanted, "csv", later)).decode()))
    shown = f"'{name}" if name.startswith("=") else name  # a spreadsheet would compute it
    assert row["branch"] == shown.replace("\x00", "\ufffd")


def test_parquet_holds_what_was_recorded(database: Database) -> None:
    made = [Event(NOW - timedelta(seconds=n), "m", "recipe", latency=n / 7) for n in range(1, 6_001)]
    ledger.add(database, made)
    table = pq.read_table(io.BytesIO(b"".join(export(database, Filter(), "parquet", NOW))))
    assert sorted(table["id"].to_pylist()) == sorted(event.id for event in made)
    assert table["cost"].null_count == len(made)


def test_events_wait_on_disk_and_arrive_once(database: Database, tmp_path: Path) -> None:
    down = Database("postgresql://nobody@127.0.0.1:1/none", 0.1)
    waiting = Recorder(down, tmp_path / "spool", Deployment())
    for number in range(10):
        waiting.record(Event(NOW, f"m{number}", "recipe"))
    with pytest.raises(StoreError):
        waiting.flush()
    (file,) = (tmp_path / "spool").glob("*.jsonl")
    copy = file.read_bytes()
    back = Recorder(database, tmp_path / "spool", Deployment())
    back.flush()
    file.write_bytes(copy)  # as if it had been killed between the delivery and the deletion
    back.flush()
    assert Usage(database).figures(Filter(), now=NOW + timedelta(seconds=1)).calls.value == 10


def test_a_killed_process_loses_at_most_the_last_second(database: Database, tmp_path: Path) -> None:
    program = f"""
import itertools, time
from datetime import datetime, timezone
from pathlib import Path
from storage.database import Database
from usage.events import Deployment, Event
from usage.recorder import Recorder
recorder = Recorder(Database("postgresql://nobody@127.0.0.1:1/none", 0.1), Path({str(tmp_path)!r}), Deployment())
recorder.start()
for number in itertools.count():
    recorder.record(Event(datetime.now(timezone.utc), "m", "recipe", request_id=str(number)))
    print(time.time(), flush=True)
    time.sleep(0.01)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    time.sleep(5)
    process.send_signal(signal.SIGKILL)
    times = [float(line) for line in process.communicate()[0].split()]
    Recorder(database, tmp_path, Deployment()).flush()
    with database.transaction() as connection:
        kept = {int(row[0]) for row in connection.execute(text("SELECT request FROM usage_events"))}
    assert len(times) > 50 and kept == set(range(len(kept)))
    assert all(when > times[-1] - 1 for when in times[len(kept) :])


@pytest.mark.parametrize(
    ("model", "came", "went", "dollars"),
    [
        ("moondream3.1-9B-A2B", 735, 45, 0.0002655),
        ("moondream3-preview", 735, 45, 0.000333),
        ("moondream3.1-9B-A2B", 738, 16, 0.0002374),
        ("moondream3-preview/01HX@500", 738, 16, 0.0002614),
        ("moondream-tiny", 735, 45, None),
    ],
)
def test_costs_are_those_of_the_published_examples(model: str, came: int, went: int, dollars: float | None) -> None:
    assert Prices().call(model, came, went) == (None if dollars is None else pytest.approx(dollars, rel=1e-9))
    assert Prices().train("moondream3-preview", 20_500_000) == pytest.approx(12.3)
    assert Prices().machine("unheard-of", 5) is None and Prices().machine(None, 5) is None


def test_prices_can_be_overridden(tmp_path: Path) -> None:
    file = tmp_path / "prices.json"
    file.write_text(json.dumps({"hardware": {"t4": 0.36}, "models": {"mine": {"input": 1, "output": 2}}}))
    prices = Prices.read(file)
    assert prices.machine("t4", 10) == pytest.approx(0.001) and prices.call("mine", 10, 10) == pytest.approx(3e-5)


def test_a_budget_warns_at_80_and_stops_at_100_percent(database: Database) -> None:
    budgets = Budgets(database)
    budgets.set(Budget("main", 1.0, stop=True))
    for cost, state in ((0.79, "ok"), (0.01, "warning"), (0.2, "spent")):
        ledger.add(database, [Event(NOW, "m", "recipe", branch="main", cost=cost, cost_basis="reported")])
        assert budgets.list(NOW)[0].state == state
    with pytest.raises(BudgetExceeded, match="main"):
        budgets.check("main", NOW)
    budgets.check("other", NOW)
    budgets.check("main", NOW + timedelta(days=1))  # the next month
