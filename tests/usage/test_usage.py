"""Tests of usage on SQLite and PostgreSQL: metrics against plain NumPy, delivery, exports, prices and budgets."""

import csv
import io
import json
import signal
import subprocess
import sys
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
from usage import rollups
from usage.analytics import UsageAnalytics
from usage.budgets import Budget, BudgetExceededError, Budgets
from usage.deployment import resolve_deployment
from usage.events import Deployment, UsageEvent
from usage.export import export_events
from usage.prices import PriceError, Prices
from usage.recorder import Recorder, insert_events
from usage.sketch import RELATIVE_ERROR, bucket_index, grouped_quantiles
from usage.time_window import PERIODS, UsageFilter, bin_starts, to_micros

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NOW = datetime(2026, 3, 31, 12, 34, 56, tzinfo=timezone.utc)  # after a DST change in Europe, at the end of a month
ZONES = ("UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Asia/Kathmandu", "Australia/Lord_Howe")
HOSTILE_NAMES = ("<script>alert(1)</script>", "'; DROP TABLE usage_events; --", "خيال", "x" * 10_000, "a\x00b", "=1+1")
UNREACHABLE_URL = "postgresql://nobody@127.0.0.1:1/none"


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    """Return an empty database of each kind."""
    file_url = f"sqlite:///{tmp_path / 'usage.sqlite3'}"
    return Database(file_url if request.param == "sqlite" else request.getfixturevalue("postgres_url"))


@st.composite
def usage_events(draw: st.DrawFn) -> UsageEvent:
    """Draw an event of the two months before NOW."""
    outcome = draw(st.sampled_from(("ok", "error", "cancelled")))
    cost = draw(st.none() | st.integers(0, 10**9).map(lambda nano: nano / 10**9))
    return UsageEvent(
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


def clear(database: Database) -> None:
    with database.transaction(write=True) as connection:
        for table in ("usage_events", "usage_hours", "usage_kinds"):
            connection.execute(text(f"DELETE FROM {table}"))


@st.composite
def usage_filters(draw: st.DrawFn) -> UsageFilter:
    """Draw a filter in any time zone: a named period, or a custom one from microseconds to more than a year."""
    zone, branches = draw(st.sampled_from(ZONES)), draw(st.sampled_from(((), ("main",), ("main", "other"))))
    period = draw(st.sampled_from(("hour", "day", "week", "30 days", "custom")))
    if period != "custom":
        return UsageFilter(period, branches, zone=zone)
    start = (NOW - timedelta(days=61)).replace(tzinfo=None) + timedelta(seconds=draw(st.integers(-(10**7), 5 * 10**6)))
    length = timedelta(microseconds=draw(st.sampled_from((1, 10**9, 10**11, 10**12, 10**13, 4 * 10**13))))
    return UsageFilter(period, branches, zone=zone, start=start, end=start + length)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(events=st.lists(usage_events(), max_size=40), usage_filter=usage_filters())
def test_metrics_and_series_equal_a_plain_numpy_computation(
    database: Database, events: list[UsageEvent], usage_filter: UsageFilter
) -> None:
    clear(database)
    insert_events(database, events)
    zone, branches = usage_filter.zone, usage_filter.branches
    window = usage_filter.window(NOW)
    selected = [e for e in events if window.start <= e.time < window.end and (not branches or e.branch in branches)]
    from_events = UsageAnalytics(database).dashboard(usage_filter, now=NOW)
    rollups.build(database, 2_000, to_micros(NOW))
    from_rollups = UsageAnalytics(database).dashboard(usage_filter, now=NOW)
    assert from_events == from_rollups
    metrics = from_events.metrics
    assert metrics.calls.value == len(selected) and metrics.percentile_error == 0.0
    for name, share in {"p50": 0.5, "p95": 0.95, "p99": 0.99}.items():
        assert getattr(metrics, name).value == percentile([e.latency for e in selected], share)
    assert metrics.first_token.value == percentile([e.first_token for e in selected if e.first_token is not None], 0.5)
    costs = [e.cost for e in selected if e.cost is not None]
    assert metrics.cost.value == (pytest.approx(sum(costs), abs=1e-9) if costs else None)
    assert metrics.unpriced == len(selected) - len(costs)
    rewards_and_costs = [(e.reward, e.cost) for e in selected if e.reward is not None and e.cost is not None]
    spent = sum(cost for _, cost in rewards_and_costs)
    assert metrics.reward_per_cent.value == (
        pytest.approx(sum(reward for reward, _ in rewards_and_costs) / (100 * spent)) if spent else None
    )
    previous = window.previous
    previous_events = [
        e for e in events if previous.start <= e.time < window.start and (not branches or e.branch in branches)
    ]
    assert metrics.calls.previous == len(previous_events)
    starts = bin_starts(window, zone)
    assert len(starts) <= 200
    times = [e.time.timestamp() for e in selected]
    bins = np.searchsorted([start.timestamp() for start in starts], times, side="right") - 1
    for line in from_events.volume.lines:
        branch_bins = [index for index, e in zip(bins, selected, strict=True) if e.branch == line.name]
        assert list(line.values) == np.bincount(np.array(branch_bins, int), minlength=len(starts)).tolist()
    for line in from_events.latency.lines:
        share = {"p50": 0.5, "p95": 0.95, "p99": 0.99}[line.name]
        by_bin = [[e.latency for p, e in zip(bins, selected, strict=True) if p == n] for n in range(len(starts))]
        assert list(line.values) == [percentile(values, share) for values in by_bin]


def test_sqlite_and_postgresql_give_the_same_dashboard(tmp_path: Path, postgres_url: str) -> None:
    random = np.random.default_rng(4)
    events = [
        UsageEvent(
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
    dashboards = []
    for url in (f"sqlite:///{tmp_path / 'usage.sqlite3'}", postgres_url):
        database = Database(url)
        insert_events(database, events)
        rollups.build(database, 500, to_micros(NOW))
        analytics = UsageAnalytics(database)
        filters = [UsageFilter(period, zone="America/New_York") for period in PERIODS]
        dashboards.append([analytics.dashboard(usage_filter, now=NOW) for usage_filter in filters])
    assert dashboards[0] == dashboards[1]


@pytest.mark.parametrize("zone", ZONES)
def test_day_bins_start_at_local_midnight_without_gaps(zone: str) -> None:
    window = UsageFilter("30 days", zone=zone).window(NOW)
    starts = bin_starts(window, zone)
    assert starts[0] <= window.start and starts[-1] < window.end and starts == sorted(set(starts))
    assert all(start.astimezone(ZoneInfo(zone)).hour == 0 for start in starts)
    assert all(to_micros(start) % rollups.QUARTER == 0 for start in starts)


def test_retired_hours_keep_their_metrics_and_accept_late_events(database: Database) -> None:
    time = (NOW - timedelta(days=100)).replace(minute=5, second=0)
    events = [UsageEvent(time + timedelta(seconds=n), "m", "recipe", latency=n / 10) for n in range(50)]
    insert_events(database, events)
    start = time.replace(minute=0)
    usage_filter = UsageFilter("custom", start=start, end=start + timedelta(hours=3))
    metrics = UsageAnalytics(database).metrics(usage_filter)
    assert rollups.retire(database, 10, to_micros(NOW - rollups.RETENTION)) == 1
    with database.transaction() as connection:
        assert connection.execute(text("SELECT count(*) FROM usage_events")).scalar() == 0
    assert UsageAnalytics(database).metrics(usage_filter) == metrics
    insert_events(database, [UsageEvent(time, "m", "recipe", latency=9.0)])
    assert UsageAnalytics(database).metrics(usage_filter).calls.value == 51
    rollups.build(database, 10, to_micros(NOW))
    assert UsageAnalytics(database).metrics(usage_filter).calls.value == 51


def test_percentiles_from_buckets_are_within_the_stated_error() -> None:
    values = np.random.default_rng(1).lognormal(13, 2, 200_000).astype(np.int64)
    calls, groups = np.ones(len(values)), np.zeros(len(values), int)
    (quantiles,) = grouped_quantiles(values, calls, bucket_index(values), groups, 1, [0.5, 0.95, 0.99])
    exact = np.quantile(values, [0.5, 0.95, 0.99], method="inverted_cdf")
    assert np.abs(np.array(quantiles, float) / exact - 1).max() <= RELATIVE_ERROR < 0.01


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=range(len(HOSTILE_NAMES)))
def test_hostile_names_are_stored_filtered_and_exported(database: Database, name: str) -> None:
    insert_events(database, [UsageEvent(NOW, name, "recipe", branch=name), UsageEvent(NOW, "m", "recipe")])
    usage_filter = UsageFilter(branches=(name,))
    later = NOW + timedelta(seconds=1)
    assert UsageAnalytics(database).metrics(usage_filter, now=later).calls.value == 1
    assert UsageAnalytics(database).recent(usage_filter, now=later)[0].branch == name.replace("\x00", "\ufffd")
    content = b"".join(export_events(database, usage_filter, "csv", later)).decode()
    (row,) = csv.DictReader(io.StringIO(content))
    expected = f"'{name}" if name.startswith("=") else name  # a spreadsheet would evaluate it
    assert row["branch"] == expected.replace("\x00", "\ufffd")


def test_parquet_export_contains_all_events(database: Database) -> None:
    events = [UsageEvent(NOW - timedelta(seconds=n), "m", "recipe", latency=n / 7) for n in range(1, 6_001)]
    insert_events(database, events)
    table = pq.read_table(io.BytesIO(b"".join(export_events(database, UsageFilter(), "parquet", NOW))))
    assert sorted(table["id"].to_pylist()) == sorted(event.id for event in events)
    assert table["cost"].null_count == len(events)


def test_spooled_events_are_delivered_once(database: Database, tmp_path: Path) -> None:
    offline = Recorder(Database(UNREACHABLE_URL, 0.1), tmp_path / "spool", Deployment())
    for number in range(10):
        offline.record(UsageEvent(NOW, f"m{number}", "recipe"))
    with pytest.raises(StoreError):
        offline.flush()
    (file,) = (tmp_path / "spool").glob("*.jsonl")
    content = file.read_bytes()
    recorder = Recorder(database, tmp_path / "spool", Deployment())
    recorder.flush()
    file.write_bytes(content)  # like a process killed between the delivery and the deletion
    recorder.flush()
    assert UsageAnalytics(database).metrics(UsageFilter(), now=NOW + timedelta(seconds=1)).calls.value == 10


def test_killed_process_loses_at_most_the_events_of_the_last_second(database: Database, tmp_path: Path) -> None:
    program = f"""
import itertools, time
from datetime import datetime, timezone
from pathlib import Path
from storage.database import Database
from usage.events import Deployment, UsageEvent
from usage.recorder import Recorder
recorder = Recorder(Database({UNREACHABLE_URL!r}, 0.1), Path({str(tmp_path)!r}), Deployment())
recorder.start()
for number in itertools.count():
    recorder.record(UsageEvent(datetime.now(timezone.utc), "m", "recipe", request_id=str(number)))
    print(time.time(), flush=True)
    time.sleep(0.01)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(200)]
    process.send_signal(signal.SIGKILL)
    times = [float(line) for line in (*lines, *process.communicate()[0].split()) if line]
    Recorder(database, tmp_path, Deployment()).flush()
    with database.transaction() as connection:
        stored = {int(row[0]) for row in connection.execute(text("SELECT request FROM usage_events"))}
    assert len(times) >= 200 and len(stored) > 50 and stored == set(range(len(stored)))
    assert all(time > times[-1] - 1 for time in times[len(stored) :])


@pytest.mark.parametrize(
    ("model", "tokens_in", "tokens_out", "dollars"),
    [
        ("moondream3.1-9B-A2B", 735, 45, 0.0002655),
        ("moondream3-preview", 735, 45, 0.000333),
        ("moondream3.1-9B-A2B", 738, 16, 0.0002374),
        ("moondream3-preview/01HX@500", 738, 16, 0.0002614),
        ("moondream-tiny", 735, 45, None),
    ],
)
def test_call_costs_match_the_published_examples(
    model: str, tokens_in: int, tokens_out: int, dollars: float | None
) -> None:
    expected = None if dollars is None else pytest.approx(dollars, rel=1e-9)
    assert Prices().call(model, tokens_in, tokens_out) == expected
    assert Prices().train("moondream3-preview", 20_500_000) == pytest.approx(12.3)
    assert Prices().machine("unheard-of", 5) is None and Prices().machine(None, 5) is None


def test_price_file_overrides_the_table(tmp_path: Path) -> None:
    file = tmp_path / "prices.json"
    file.write_text(json.dumps({"hardware": {"t4": 0.36}, "models": {"mine": {"input": 1, "output": 2}}}))
    prices = Prices.read(file)
    assert prices.machine("t4", 10) == pytest.approx(0.001) and prices.call("mine", 10, 10) == pytest.approx(3e-5)
    assert prices.call("moondream3-preview", 735, 45) == Prices().call("moondream3-preview", 735, 45)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "JSON"),
        ("[]", "prices.json"),
        ('{"gpus": {}}', "gpus"),
        ('{"hardware": {"t4": -1}}', "hardware.t4"),
        ('{"hardware": {"t4": true}}', "hardware.t4"),
        ('{"hardware": {"t4": NaN}}', "hardware.t4"),
        ('{"models": {"m": {"input": 1}}}', "models.m.output"),
        ('{"models": {"m": 1}}', "models.m"),
    ],
)
def test_invalid_price_file_is_rejected_with_its_location(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "prices.json"
    file.write_text(content)
    with pytest.raises(PriceError, match=message):
        Prices.read(file)
    with pytest.raises(PriceError, match=r"missing\.json cannot be read"):
        Prices.read(tmp_path / "missing.json")


def test_budget_warns_at_80_and_stops_at_100_percent(database: Database) -> None:
    budgets = Budgets(database)
    budgets.set(Budget("main", 1.0, stop=True))
    for cost, state in ((0.79, "ok"), (0.01, "warning"), (0.2, "spent")):
        insert_events(database, [UsageEvent(NOW, "m", "recipe", branch="main", cost=cost, cost_basis="reported")])
        assert budgets.list(NOW)[0].state == state
    with pytest.raises(BudgetExceededError, match="main"):
        budgets.check("main", NOW)
    budgets.check("other", NOW)
    budgets.check("main", NOW + timedelta(days=1))  # next month


def test_deployment_is_read_from_git_unless_the_settings_name_it(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert resolve_deployment(None, None, None, tmp_path) == Deployment("local")
    git("init", "--initial-branch=feat/x")
    assert resolve_deployment(None, None, None, tmp_path) == Deployment("feat/x")
    git("commit", "--allow-empty", "--message=first")
    commit = git("rev-parse", "HEAD")
    assert resolve_deployment(None, None, "me/space", tmp_path) == Deployment("feat/x", commit, "me/space")
    assert resolve_deployment("main", "c0ffee", None, tmp_path) == Deployment("main", "c0ffee")
    git("checkout", "--detach")
    assert resolve_deployment(None, None, None, tmp_path) == Deployment("detached", commit)
