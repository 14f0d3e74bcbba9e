"""Tests of usage on SQLite and PostgreSQL: metrics against plain NumPy, delivery, exports, prices and budgets."""

import csv
import io
import json
import signal
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from storage.database import Database, StoreError
from usage.analytics import QUARTER, UsageAnalytics
from usage.archive import archive_old_events
from usage.budgets import Budget, BudgetExceededError, Budgets
from usage.cache import EventCache
from usage.deployment import resolve_deployment
from usage.events import VISITOR_HASH, Deployment, Payer, UsageEvent
from usage.export import UsageCollector, export_events
from usage.prices import PriceError, Prices
from usage.recorder import Recorder, insert_events
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
    tokens = draw(st.none() | st.integers(0, 1000))
    return UsageEvent(
        NOW - timedelta(microseconds=draw(st.integers(1, 60 * 86_400 * 10**6))),
        draw(st.sampled_from(("m1", "m2"))),
        draw(st.sampled_from(("recipe", "query"))),
        outcome,
        draw(st.integers(0, 10**8)) / 10**6,
        branch=draw(st.sampled_from(("main", "other"))),
        error="failed" if outcome == "error" else "",
        first_token=draw(st.none() | st.integers(0, 10**7).map(lambda us: us / 10**6)),
        queue=draw(st.none() | st.integers(0, 10**7).map(lambda us: us / 10**6)),
        cold_start=draw(st.none() | st.integers(0, 10**7).map(lambda us: us / 10**6)),
        tokens_in=tokens,
        tokens_out=tokens,
        tokens_basis="unknown" if tokens is None else "reported",
        cost=cost,
        cost_basis="unknown" if cost is None else "estimated",
        reward=draw(st.none() | st.integers(0, 10**6).map(lambda millionths: millionths / 10**6)),
    )


def percentile(values: list[float], share: float) -> float | None:
    return float(np.quantile(values, share, method="inverted_cdf")) if values else None


def mean(values: list[float | None]) -> Any:
    """Return the approximate mean of the known values, or None if there are none."""
    known = [value for value in values if value is not None]
    return pytest.approx(sum(known) / len(known), abs=1e-9) if known else None


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
    analytics = UsageAnalytics(database)
    clear(database)
    insert_events(database, events)
    zone, branches = usage_filter.zone, usage_filter.branches
    window = usage_filter.window(NOW)
    selected = [e for e in events if window.start <= e.time < window.end and (not branches or e.branch in branches)]
    dashboard = analytics.dashboard(usage_filter, now=NOW)
    metrics = dashboard.metrics
    assert metrics.calls.value == len(selected)
    for name, share in {"p50": 0.5, "p95": 0.95, "p99": 0.99}.items():
        assert getattr(metrics, name).value == percentile([e.latency for e in selected], share)
    assert metrics.first_token.value == percentile([e.first_token for e in selected if e.first_token is not None], 0.5)
    assert metrics.queue.value == percentile([e.queue for e in selected if e.queue is not None], 0.95)
    cold_starts = sum(e.cold_start is not None for e in selected)
    assert metrics.cold_starts.value == cold_starts
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
    assert metrics.p95.previous == percentile([e.latency for e in previous_events], 0.95)
    tokens = [2 * e.tokens_in for e in selected if e.tokens_in is not None]
    assert metrics.tokens.value == (sum(tokens) if tokens else None) and metrics.estimated == len(costs)
    assert metrics.uncounted == len(selected) - len(tokens)
    failed = sum(e.outcome == "error" for e in selected)
    assert metrics.error_rate.value == (failed / len(selected) if selected else None)
    assert [error.calls for error in dashboard.errors] == ([failed] if failed else [])
    for branch in dashboard.branches:
        calls = [e for e in selected if e.branch == branch.name]
        assert (branch.calls, branch.reward) == (len(calls), mean([e.reward for e in calls]))
        assert branch.cost_per_request == mean([e.cost for e in calls])
    for point, model_cost in zip(dashboard.scatter, dashboard.cost_per_model, strict=True):
        calls = [e for e in selected if e.model == point.model]
        assert point.calls == len(calls) and point.latency == percentile([e.latency for e in calls], 0.5)
        assert point.reward == mean([e.reward for e in calls])
        assert model_cost.unpriced == sum(e.cost is None for e in calls)
    starts = bin_starts(window, zone)
    assert len(starts) <= 200
    times = [e.time.timestamp() for e in selected]
    bins = np.searchsorted([start.timestamp() for start in starts], times, side="right") - 1
    for line in dashboard.volume.lines:
        branch_bins = [index for index, e in zip(bins, selected, strict=True) if e.branch == line.name]
        assert list(line.values) == np.bincount(np.array(branch_bins, int), minlength=len(starts)).tolist()
    for line in dashboard.latency.lines:
        share = {"p50": 0.5, "p95": 0.95, "p99": 0.99}[line.name]
        by_bin = [[e.latency for p, e in zip(bins, selected, strict=True) if p == n] for n in range(len(starts))]
        assert list(line.values) == [percentile(values, share) for values in by_bin]
    for line in analytics.series(usage_filter, "p95", "skill", NOW).lines:
        chosen = [(index, e.latency) for index, e in zip(bins, selected, strict=True) if e.skill == line.name]
        by_bin = [[latency for index, latency in chosen if index == n] for n in range(len(starts))]
        assert list(line.values) == [percentile(values, 0.95) for values in by_bin]


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
    assert all(to_micros(start) % QUARTER == 0 for start in starts)


def counters(collector: UsageCollector) -> dict[tuple[str, ...], float]:
    """Return the value of every counter by name and labels."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in collector.collect()
        if family.type == "counter"
        for sample in family.samples
    }


def test_prometheus_has_queue_times_and_cold_starts_from_one_read(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, reads = EventCache(database), []
    read = cache.read
    monkeypatch.setattr(cache, "read", lambda: reads.append(cache) or read())
    events = [
        UsageEvent(NOW, "m", "recipe", latency=0.2, queue=0.5, cold_start=2.0),
        UsageEvent(NOW, "m", "recipe", "error", latency=3.0, queue=0.25),
        UsageEvent(NOW, "m", "recipe", latency=90.0),
    ]
    insert_events(database, events)
    recorder = Recorder(database, tmp_path / "spool", Deployment())
    collector = UsageCollector(cache, Budgets(database), recorder)
    values = counters(collector)
    assert len(reads) == 1

    def value(name: str, outcome: str) -> float:
        return values[(f"moondream_{name}_total", "local", "m", "recipe", outcome)]

    assert (value("queue_seconds", "ok"), value("queue_seconds", "error")) == (0.5, 0.25)
    assert (value("cold_starts", "ok"), value("cold_starts", "error")) == (1, 0)
    assert value("cold_start_seconds", "ok") == 2.0
    (histogram,) = (family for family in collector.collect() if family.type == "histogram")
    samples = {(sample.name, sample.labels.get("le")): sample.value for sample in histogram.samples}
    buckets = {limit: value for (_, limit), value in samples.items() if limit}
    assert (buckets["0.1"], buckets["0.25"], buckets["5.0"], buckets["60.0"], buckets["+Inf"]) == (0, 1, 2, 2, 3)
    assert samples["moondream_call_duration_seconds_sum", None] == pytest.approx(93.2)


def test_prometheus_counters_do_not_fall_at_retention(database: Database, tmp_path: Path) -> None:
    def record(time: datetime, count: int, first: int = 0) -> list[UsageEvent]:
        return [
            UsageEvent(
                time + timedelta(milliseconds=n),
                f"m{n % 3}",
                "recipe",
                latency=n / 8,
                cost=n / 1024 if n % 2 else None,
                cost_basis="estimated" if n % 2 else "unknown",
                tokens_in=n if n % 5 else None,
                tokens_out=7,
                tokens_basis="reported" if n % 5 else "unknown",
                id=f"{n:032d}",
            )
            for n in range(first, first + count)
        ]

    recorder = Recorder(database, tmp_path / "spool", Deployment())
    collector = UsageCollector(EventCache(database), Budgets(database), recorder)
    old = NOW - timedelta(days=500)
    insert_events(database, record(old, 2_500))
    insert_events(database, record(old + timedelta(days=40), 40, 3_000))
    insert_events(database, record(NOW - timedelta(hours=2), 40, 4_000))
    before = counters(collector)
    assert sum(before["moondream_calls_total", "local", f"m{n}", "recipe", "ok"] for n in range(3)) == 2_580
    assert archive_old_events(database, NOW) == 2_540
    with database.transaction() as connection:
        assert connection.execute(text("SELECT count(*) FROM usage_events")).scalar() == 40
    assert counters(collector) == before
    assert counters(UsageCollector(EventCache(database), Budgets(database), recorder)) == before  # after a restart
    insert_events(database, record(old, 30, 5_000))  # late events of an archived month
    late = counters(collector)
    key = ("moondream_calls_total", "local", "m0", "recipe", "ok")
    assert late[key] == before[key] + 10 and all(late[name] >= value for name, value in before.items())
    assert archive_old_events(database, NOW) == 30
    assert counters(collector) == late


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=range(len(HOSTILE_NAMES)))
def test_hostile_names_are_stored_filtered_and_exported(database: Database, name: str) -> None:
    insert_events(database, [UsageEvent(NOW, name, "recipe", branch=name), UsageEvent(NOW, "m", "recipe")])
    usage_filter = UsageFilter(branches=(name,))
    later = NOW + timedelta(seconds=1)
    assert UsageAnalytics(database).metrics(usage_filter, now=later).calls.value == 1
    assert UsageAnalytics(database).recent(usage_filter, now=later)[0].branch == name.replace("\x00", "\ufffd")
    content = b"".join(export_events(EventCache(database), usage_filter, "csv", later)).decode()
    (row,) = csv.DictReader(io.StringIO(content))
    expected = f"'{name}" if name.startswith("=") else name  # a spreadsheet would evaluate it
    assert row["branch"] == expected.replace("\x00", "\ufffd")


def test_parquet_export_contains_all_events(database: Database) -> None:
    events = [UsageEvent(NOW - timedelta(seconds=n), "m", "recipe", latency=n / 7) for n in range(1, 6_001)]
    insert_events(database, events)
    table = pq.read_table(io.BytesIO(b"".join(export_events(EventCache(database), UsageFilter(), "parquet", NOW))))
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


def test_spool_file_that_the_delivery_deletes_does_not_stop_the_spooling(database: Database, tmp_path: Path) -> None:
    # A link without a target is listed but cannot be opened, like a file that is deleted after the listing.
    (tmp_path / "0000-deleted.jsonl").symlink_to(tmp_path / "missing")
    recorder = Recorder(database, tmp_path, Deployment())
    recorder.record(UsageEvent(NOW, "m", "recipe"))
    recorder.flush()
    assert recorder.lost == 0
    assert UsageAnalytics(database).metrics(UsageFilter(), now=NOW + timedelta(seconds=1)).calls.value == 1


def exported(database: Database) -> bytes:
    """Return both exports; Parquet as text of its rows, because its columns are compressed."""
    later = NOW + timedelta(seconds=1)
    parquet = b"".join(export_events(EventCache(database), UsageFilter(), "parquet", later))
    rows = json.dumps(pq.read_table(io.BytesIO(parquet)).to_pylist(), default=str)
    return b"".join(export_events(EventCache(database), UsageFilter(), "csv", later)) + rows.encode()


def test_session_hashes_of_older_versions_are_not_delivered_from_the_spool(database: Database, tmp_path: Path) -> None:
    old = {"id": "1" * 32, "time": to_micros(NOW), "model": "m", "skill": "recipe", "session": "gradiohash1"}
    others = [{"id": "2" * 32, "session": "gradiohash1"}, {"id": "3" * 32, "session": "gradiohash2"}]
    lines = (json.dumps(old | other) + "\n" for other in ({}, *others, {"id": "4" * 32, "session": ""}))
    (tmp_path / "0001-old.jsonl").write_text("".join(lines))
    Recorder(database, tmp_path, Deployment()).flush()
    with database.transaction() as connection:
        sessions = connection.execute(text("SELECT session FROM usage_events ORDER BY id")).scalars().all()
    assert all(VISITOR_HASH.fullmatch(session) for session in sessions[:3]) and sessions[3] == ""
    assert sessions[0] == sessions[1] != sessions[2]
    assert not list(tmp_path.glob("*.bad"))


@pytest.mark.parametrize("session", ["gradiohash1", "v1-gradiohash1", "V1-" + "a" * 24, "v1-" + "a" * 25, "\ud800"])
def test_session_hashes_that_older_versions_insert_are_not_exported_or_displayed(
    database: Database, session: str
) -> None:
    event = UsageEvent(NOW, "m", "recipe", session="v1-" + "a" * 24)
    insert_events(database, [event])
    assert event.session.encode() in exported(database)
    if session == "\ud800":  # no database can store it
        assert VISITOR_HASH.fullmatch(UsageEvent(NOW, "m", "recipe", session=session).session)
        return
    with database.transaction(write=True) as connection:
        connection.execute(text("UPDATE usage_events SET session = :session"), {"session": session})
    assert session.encode() not in exported(database)
    (recent,) = UsageAnalytics(database).recent(UsageFilter(), now=NOW + timedelta(seconds=1))
    assert VISITOR_HASH.fullmatch(recent.session) and recent.session != event.session


@pytest.mark.parametrize("payer", ["deployment", "visitor"])
def test_payer_is_spooled_stored_and_exported(database: Database, tmp_path: Path, payer: Payer) -> None:
    recorder = Recorder(database, tmp_path, Deployment())
    recorder.record(UsageEvent(NOW, "m", "recipe", cost=0.25, cost_basis="reported", payer=payer))
    recorder.close()  # spools
    Recorder(database, tmp_path, Deployment()).flush()
    later = NOW + timedelta(seconds=1)
    analytics = UsageAnalytics(database)
    assert analytics.recent(UsageFilter(), now=later)[0].payer == payer
    assert analytics.metrics(UsageFilter(), now=later).cost.value == 0.25
    content = b"".join(export_events(analytics.cache, UsageFilter(), "csv", later)).decode()
    (row,) = csv.DictReader(io.StringIO(content))
    assert row["payer"] == payer
    table = pq.read_table(io.BytesIO(b"".join(export_events(analytics.cache, UsageFilter(), "parquet", later))))
    assert table["payer"].to_pylist() == [payer]


def test_payer_must_be_known() -> None:
    with pytest.raises(ValueError, match="payer"):
        UsageEvent(NOW, "m", "recipe", payer="nobody")  # type: ignore[arg-type]


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


def test_calls_paid_by_visitors_do_not_count_against_a_budget(database: Database) -> None:
    budgets = Budgets(database)
    for branch in ("main", ""):
        budgets.set(Budget(branch, 1.0, stop=True))
    priced = {"branch": "main", "cost": 5.0, "cost_basis": "reported"}
    events = [UsageEvent(NOW, "m", "recipe", payer="visitor", **priced)]
    insert_events(database, [*events, UsageEvent(NOW, "m", "recipe", branch="main", payer="visitor")])
    assert [(status.spent, status.unpriced) for status in budgets.list(NOW)] == [(0.0, 0), (0.0, 0)]
    budgets.check("main", NOW)
    insert_events(database, [UsageEvent(NOW, "m", "recipe", **priced)])  # equal except for its payer
    assert [status.spent for status in budgets.list(NOW)] == [5.0, 5.0]
    with pytest.raises(BudgetExceededError, match="all branches"):
        budgets.check("main", NOW)


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
