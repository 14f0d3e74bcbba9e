"""Tests of the DuckDB cache on SQLite and PostgreSQL: it always has the events of the database and of its archive."""

from __future__ import annotations

import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from sqlalchemy import text

from storage.database import Database, StoreError
from tests.support.usage_cache import building
from usage import archive, cache
from usage.analytics import UsageAnalytics
from usage.archive import archive_old_events
from usage.cache import EventCache
from usage.events import UsageEvent
from usage.recorder import insert_events
from usage.time_window import UsageFilter, to_micros

NOW = datetime(2026, 11, 20, 12, 30, tzinfo=timezone.utc)
ALL = UsageFilter("custom", start=NOW - timedelta(days=3000), end=NOW + timedelta(days=1))


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    """Return an empty database of each kind."""
    file_url = f"sqlite:///{tmp_path / 'usage.sqlite3'}"
    return Database(file_url if request.param == "sqlite" else request.getfixturevalue("postgres_url"))


def events(count: int, prefix: str = "e", time: datetime = NOW, **values: object) -> list[UsageEvent]:
    return [
        UsageEvent(time + timedelta(seconds=n), "m", "recipe", latency=n, id=f"{prefix}{n}", **values)  # type: ignore[arg-type]
        for n in range(count)
    ]


def cached(event_cache: EventCache) -> set[str]:
    """Return the ids of the cached events, of which none may occur twice."""
    with event_cache.read() as cursor:
        rows = cursor.execute("SELECT id FROM events").fetchall()
    assert len(rows) == len(set(rows))
    return {row[0] for row in rows}


def change(database: Database, *statements: str) -> None:
    """Change events as every writer has to: with the number of changes of their hour."""
    with database.transaction(write=True) as connection:
        for statement in (*statements, "UPDATE usage_hours SET changes = changes + 1"):
            connection.execute(text(statement))


def test_insertions_changes_deletions_and_renamed_branches_reach_the_cache(database: Database, tmp_path: Path) -> None:
    analytics = UsageAnalytics(database, tmp_path)
    priced = events(7, cost=1.0, cost_basis="reported")
    insert_events(database, priced[:5])
    assert cached(analytics.cache) == {f"e{n}" for n in range(5)}
    insert_events(database, priced)
    assert cached(analytics.cache) == {f"e{n}" for n in range(7)}
    change(database, "DELETE FROM usage_events WHERE id IN ('e2', 'e6')")
    assert cached(analytics.cache) == {"e0", "e1", "e3", "e4", "e5"}
    insert_events(database, priced[6:])  # SQLite may use the number of a deleted row again
    change(database, "UPDATE usage_events SET cost = 2000000000 WHERE id = 'e3'")
    assert analytics.metrics(ALL).cost.value == 7.0 and analytics.metrics(ALL).calls.value == 6
    with database.transaction(write=True) as connection:
        connection.execute(text("UPDATE usage_kinds SET branch = 'renamed'"))
    assert analytics.options().branches == ("renamed",)
    assert {event.branch for event in analytics.recent(ALL)} == {"renamed"}


@pytest.mark.postgres
def test_transaction_that_commits_after_later_numbers_is_not_missed(postgres_url: str) -> None:
    database, event_cache = Database(postgres_url), EventCache(Database(postgres_url))
    insert_events(database, events(1))
    assert cached(event_cache) == {"e0"}
    inserted, commit = threading.Event(), threading.Event()

    def insert_slowly() -> None:
        copy = "INSERT INTO usage_events (id, time, kind, latency, candidates, request, session) "
        copy += f"SELECT 'slow', {to_micros(NOW)}, kind, 1, 1, '', '' FROM usage_events WHERE id = 'e0'"
        with database.transaction(write=True) as connection:
            connection.execute(text(copy))
            inserted.set()
            commit.wait(30)
            connection.execute(text("UPDATE usage_hours SET changes = changes + 1"))

    thread = threading.Thread(target=insert_slowly)
    thread.start()
    assert inserted.wait(30)
    insert_events(Database(postgres_url), events(1, "fast"))
    assert cached(event_cache) == {"e0", "fast0"}
    commit.set()
    thread.join(30)
    assert cached(event_cache) == {"e0", "fast0", "slow"}


def test_file_is_used_again_after_a_restart_and_replaced_if_it_does_not_fit(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert_events(database, events(5))
    file = tmp_path / cache.CACHE_FOLDER / "0.duckdb"

    def reopen(other: Database | None = None) -> set[str]:
        event_cache = EventCache(other or database, tmp_path)
        ids = cached(event_cache)
        event_cache.close()
        return ids

    def mark() -> None:
        with duckdb.connect(str(file)) as connection:
            connection.execute("UPDATE events SET id = 'from-the-file' WHERE id = 'e4'")

    assert reopen() == {f"e{n}" for n in range(5)}
    mark()
    assert "from-the-file" in reopen()
    for content in (b"", b"not a database" * 1000, file.read_bytes()[:20_000]):
        file.write_bytes(content)
        assert reopen() == {f"e{n}" for n in range(5)}
    mark()
    with monkeypatch.context() as patched:
        patched.setattr(cache, "VERSION", cache.VERSION + 1)
        assert reopen() == {f"e{n}" for n in range(5)}
    assert reopen(Database(f"sqlite:///{tmp_path / 'other.sqlite3'}")) == set()


def test_read_reports_the_progress_while_the_cache_is_built(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert_events(database, events(5))
    event_cache = EventCache(database, tmp_path)
    with building(event_cache, monkeypatch) as finish:
        with pytest.raises(cache.CacheBuildingError, match="2 of 5"):
            cached(event_cache)
        finish()
        assert len(cached(event_cache)) == 5


def test_whole_cache_is_compared_with_the_database_after_the_start(database: Database, tmp_path: Path) -> None:
    insert_events(database, events(5))
    event_cache = EventCache(database, tmp_path)
    assert len(cached(event_cache)) == 5
    with database.transaction(write=True) as connection:  # without incrementing `changes`
        connection.execute(text("DELETE FROM usage_events WHERE id = 'e3'"))
    event_cache.verify()
    assert cached(event_cache) == {"e0", "e1", "e2", "e4"}


def test_cache_is_compared_in_parts_between_which_it_can_be_read(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "EVENTS_PER_PART", 10)
    for day in range(6):
        insert_events(database, events(20, f"d{day}-", NOW + timedelta(days=day)))
    event_cache = EventCache(database, tmp_path)
    assert len(cached(event_cache)) == 120
    with database.transaction(write=True) as connection:  # without incrementing `changes`
        connection.execute(text("DELETE FROM usage_events WHERE id IN ('d0-3', 'd3-0', 'd5-19')"))
    sizes = []

    def read(_: float) -> bool:
        sizes.append(len(cached(event_cache)))  # would wait forever if the comparison kept the lock
        return False

    monkeypatch.setattr(event_cache._closed, "wait", read)
    event_cache.verify()
    assert sorted(set(sizes)) == [117, 118, 119, 120] and sizes == sorted(sizes, reverse=True)


def test_damage_during_a_query_is_reported_and_repaired(database: Database, tmp_path: Path) -> None:
    insert_events(database, events(3))
    event_cache = EventCache(database, tmp_path)
    with pytest.raises(StoreError, match="built again"), event_cache.read():
        raise duckdb.IOException("Could not read enough bytes")
    assert len(cached(event_cache)) == 3


def test_period_that_does_not_fit_into_memory_is_an_error_that_says_what_to_do(
    database: Database, tmp_path: Path
) -> None:
    insert_events(database, events(3))
    event_cache = EventCache(database, tmp_path)
    with pytest.raises(StoreError, match="shorter period"), event_cache.read() as cursor:
        cursor.execute("SET memory_limit = '8MB'")
        cursor.execute("SELECT quantile_disc(range, 0.5), list(range) FROM range(10_000_000)").fetchall()
    assert len(cached(event_cache)) == 3


def test_every_process_has_its_own_file(database: Database, tmp_path: Path) -> None:
    insert_events(database, events(3))
    first, second = EventCache(database, tmp_path), EventCache(database, tmp_path)
    assert cached(first) == cached(second) == {"e0", "e1", "e2"}
    assert sorted(path.name for path in (tmp_path / cache.CACHE_FOLDER).glob("*.duckdb")) == ["0.duckdb", "1.duckdb"]
    first.close()
    assert len(cached(EventCache(database, tmp_path))) == 3  # in the first file


def test_cache_is_in_memory_if_its_folder_cannot_be_written(database: Database, tmp_path: Path) -> None:
    insert_events(database, events(3))
    (tmp_path / "file").write_text("not a folder")
    assert len(cached(EventCache(database, tmp_path / "file"))) == 3


def test_archived_events_stay_in_every_figure(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "MAX_EVENTS", 40)
    analytics = UsageAnalytics(database, tmp_path)
    insert_events(database, events(100, "old", NOW - timedelta(days=500), branch="b", cost=0.5, cost_basis="reported"))
    insert_events(database, events(10, "older", NOW - timedelta(days=600)) + events(5))
    before = analytics.dashboard(ALL, now=NOW), analytics.recent(ALL, 500, NOW)
    assert archive_old_events(database, NOW) == 110
    with database.transaction() as connection:
        assert connection.execute(text("SELECT count(*) FROM usage_events")).scalar() == 5
    for reader in (analytics, UsageAnalytics(database, tmp_path / "other"), UsageAnalytics(database)):
        assert (reader.dashboard(ALL, now=NOW), reader.recent(ALL, 500, NOW)) == before
    files = sorted((tmp_path / cache.ARCHIVE_FOLDER).glob("*.parquet"))
    assert [path.name[:7] for path in files] == ["2025-03", "2025-07", "2025-07", "2025-07"]
    assert [len(pq.read_table(path)) for path in files] == [10, 40, 40, 20]
    assert set(pq.read_table(files[1])["branch"].to_pylist()) == {"b"}
    insert_events(database, events(1, "late", NOW - timedelta(days=500)))
    assert analytics.metrics(ALL, now=NOW).calls.value == 116
    assert archive_old_events(database, NOW) == 1 and archive_old_events(database, NOW) == 0
    assert analytics.metrics(ALL, now=NOW).calls.value == 116


def test_archives_of_earlier_versions_lack_younger_columns(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    old = NOW - timedelta(days=500)
    insert_events(database, events(3, "old", old, cold_start=1.0))
    written = archive.pq.write_table
    with monkeypatch.context() as patch:
        patch.setattr(
            archive.pq, "write_table", lambda rows, *args, **kw: written(rows.drop_columns("cold_start"), *args, **kw)
        )
        assert archive_old_events(database, NOW) == 3
    insert_events(database, events(2, "older", old - timedelta(days=40), cold_start=2.0))
    assert archive_old_events(database, NOW) == 2
    metrics = UsageAnalytics(database).metrics(ALL, now=NOW)
    assert (metrics.calls.value, metrics.cold_starts.value) == (5, 2)
