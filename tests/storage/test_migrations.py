"""Tests of schema migrations: databases of earlier versions keep their content, and earlier versions can go on."""

import hashlib
import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import inspect, text

from storage import migrate
from storage.database import Database
from storage.reward_functions import RewardFunctionStore
from usage.analytics import UsageAnalytics
from usage.budgets import Budget, Budgets
from usage.events import VISITOR_HASH, UsageEvent
from usage.recorder import insert_events
from usage.time_window import UsageFilter, to_micros

VERSION_1 = """
CREATE TABLE schema_version (version INTEGER NOT NULL);
INSERT INTO schema_version VALUES (1);
CREATE TABLE reward_functions (id INTEGER NOT NULL PRIMARY KEY, name VARCHAR(80) NOT NULL,
    name_key TEXT NOT NULL UNIQUE, weights TEXT NOT NULL, created DATETIME NOT NULL, updated DATETIME NOT NULL);
INSERT INTO reward_functions VALUES
    (1, 'crisp', 'crisp', '{"sharpness": 1.0}', '2026-11-01 10:00:00.000000', '2026-11-01 10:00:00.000000');
"""


def test_database_of_version_1_keeps_its_reward_functions(tmp_path: Path) -> None:
    file = tmp_path / "old.sqlite3"
    with sqlite3.connect(file) as connection:
        connection.executescript(VERSION_1)
    connection.close()
    assert [saved.name for saved in RewardFunctionStore(f"sqlite:///{file}").list()] == ["crisp"]
    with sqlite3.connect(file) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("0008",)]
        assert connection.execute("SELECT count(*) FROM usage_events").fetchone() == (0,)
    connection.close()


NOW = datetime(2026, 11, 20, 12, tzinfo=timezone.utc)
KIND = ("topic", "c0", "", "playground", "m", "", "recipe", "ok", "", "unknown", "reported")
KIND_COLUMNS = 'branch, "commit", space, source, model, adapter, skill, outcome, error, tokens_basis, cost_basis'
DIGEST = hashlib.sha256(json.dumps(KIND).encode()).hexdigest()


def insert_as_version_2(database: Database, sessions: list[str], prefix: str = "old") -> None:
    """Insert an event of a dollar per session with the statements of version 2, in which kinds had no payer."""
    with database.transaction(write=True) as connection:
        names = {f"n{index}": name for index, name in enumerate(KIND)}
        connection.execute(
            text(
                f"INSERT INTO usage_kinds (digest, {KIND_COLUMNS}) VALUES (:digest, {':' + ', :'.join(names)}) "
                "ON CONFLICT (digest) DO NOTHING"
            ),
            {"digest": DIGEST, **names},
        )
        kind = connection.execute(text("SELECT id FROM usage_kinds WHERE digest = :d"), {"d": DIGEST}).scalar_one()
        rows = [
            {"id": f"{prefix}{n}", "time": to_micros(NOW) + n, "kind": kind, "session": session}
            for n, session in enumerate(sessions)
        ]
        connection.execute(
            text(
                "INSERT INTO usage_events (id, time, kind, latency, cost, candidates, request, session) "
                "VALUES (:id, :time, :kind, 1, 1000000000, 1, 'r', :session)"
            ),
            rows,
        )


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def version_2(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    """Return a database of version 2 of each kind. It is upgraded when it is opened again."""
    url = f"sqlite:///{tmp_path / 'x.sqlite3'}"
    url = url if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    revisions = tmp_path / "migrations" / "versions"
    revisions.mkdir(parents=True)
    for file in sorted((migrate.FOLDER / "versions").glob("v000[12]_*.py")):
        (revisions / file.name).write_bytes(file.read_bytes())
    with monkeypatch.context() as patched:
        patched.setattr(migrate, "FOLDER", revisions.parent)
        database = Database(url)
        with database.transaction() as connection:
            assert "user_reward_functions" not in inspect(connection).get_table_names()
    return database


def reopen(database: Database) -> Database:
    database.close()
    return Database(database._url.render_as_string(hide_password=False))


def test_sessions_of_version_2_are_hashed(version_2: Database) -> None:
    sessions = [*(f"gradio{n % 12_000}" for n in range(25_000)), "", "v1-chosen by a client"]
    insert_as_version_2(version_2, sessions)
    database = reopen(version_2)
    with database.transaction() as connection:
        stored = connection.execute(text("SELECT session FROM usage_events ORDER BY time")).scalars().all()
        tables = set(inspect(connection).get_table_names())
    hashes = dict(zip(sessions, stored, strict=True))
    assert hashes.pop("") == ""
    assert all(VISITOR_HASH.fullmatch(session) for session in hashes.values())
    assert len(set(hashes.values())) == len(hashes) == 12_001
    assert stored == [hashes.get(session, "") for session in sessions]  # equal sessions have equal hashes
    assert "visitor_hashes" not in tables and "user_reward_functions" in tables
    usage_filter = UsageFilter("custom", start=NOW - timedelta(hours=1), end=NOW + timedelta(hours=1))
    assert UsageAnalytics(database).metrics(usage_filter).calls.value == len(sessions)
    assert UsageAnalytics(database).recent(usage_filter)[0].payer == "deployment"


def test_branches_of_version_2_go_on_writing_to_the_new_schema(version_2: Database) -> None:
    database = reopen(version_2)
    event = UsageEvent(
        NOW,
        "m",
        "recipe",
        branch="topic",
        commit="c0",
        source="playground",
        cost=1.0,
        cost_basis="reported",
        cold_start=0.5,
    )
    visitors = UsageEvent(**{**vars(event), "id": "visitor", "payer": "visitor"})
    insert_events(database, [event, visitors])
    insert_as_version_2(database, ["gradiohash"])
    with database.transaction() as connection:
        kinds = connection.execute(text("SELECT digest, payer FROM usage_kinds")).all()
        sessions = connection.execute(text("SELECT session FROM usage_events")).scalars().all()
    assert sorted(payer for _, payer in kinds) == ["deployment", "visitor"]
    assert (DIGEST, "deployment") in kinds  # of both versions
    assert sorted(sessions) == ["", "", "gradiohash"]
    Budgets(database).set(Budget("topic", 10))
    assert Budgets(database).list(NOW)[0].spent == 2.0
    usage_filter = UsageFilter("custom", start=NOW - timedelta(hours=1), end=NOW + timedelta(hours=1))
    events = UsageAnalytics(database).recent(usage_filter)
    assert sorted(event.payer for event in events) == ["deployment", "deployment", "visitor"]
    assert not any("gradiohash" in event.session for event in events)
    assert sorted(str(event.cold_start) for event in events) == ["0.5", "0.5", "None"]


def test_databases_created_concurrently_do_not_mix(tmp_path: Path) -> None:
    def create(number: int) -> set[str]:
        with Database(f"sqlite:///{tmp_path / f'{number}.sqlite3'}").transaction() as connection:
            return set(inspect(connection).get_table_names())

    with ThreadPoolExecutor(8) as threads:
        schemas = list(threads.map(create, range(24)))
    assert "usage_events" in schemas[0] and all(tables == schemas[0] for tables in schemas)
