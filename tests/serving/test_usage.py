"""The routes of usage: figures as JSON, events as files, Prometheus' text; refusals, and a dead database."""

import csv
import io
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from serving import usage as routes
from storage.database import Database
from usage import ledger
from usage.analytics import Usage
from usage.budgets import Budget, Budgets
from usage.events import Deployment, Event
from usage.recorder import Recorder

NOW = datetime.now(timezone.utc)
HOSTILE = 'a"b\\c\nd'


def client_of(database: Database, folder: Path) -> TestClient:
    app = FastAPI()
    app.include_router(
        routes.router(Usage(database), Budgets(database), Recorder(database, folder / "spool", Deployment()))
    )
    return TestClient(app)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """Thirty calls of the last half hour: ten on main at a cent each, twenty on a branch with a hostile name."""
    folder = tmp_path_factory.mktemp("usage")
    database = Database(f"sqlite:///{folder / 'usage.sqlite3'}")
    ledger.add(
        database,
        [
            Event(
                NOW - timedelta(minutes=n),
                "m",
                "recipe",
                latency=n / 10,
                branch="main" if n < 10 else HOSTILE,
                cost=0.01 if n < 10 else None,
                cost_basis="reported" if n < 10 else "unknown",
            )
            for n in range(30)
        ],
    )
    Budgets(database).set(Budget("main", 2.0))
    yield client_of(database, folder)


def test_figures_have_units_and_unknown_costs_are_counted(client: TestClient) -> None:
    told = client.get("/v1/usage").json()
    assert told["figures"]["calls"] == {"value": 30, "before": 0, "change": None, "unit": "calls"}
    assert told["figures"]["cost"]["value"] == pytest.approx(0.1) and told["calls_without_known_cost"] == 20
    one = client.get("/v1/usage", params={"branch": HOSTILE, "model": "m"}).json()["figures"]
    assert one["calls"]["value"] == 20 and one["cost"]["value"] is None
    assert client.get("/v1/usage", params={"branch": ["main", HOSTILE]}).json()["figures"]["calls"]["value"] == 30


def test_a_time_without_an_offset_is_on_the_clock_of_the_zone(client: TestClient) -> None:
    start = NOW - timedelta(minutes=9.5)
    for zone, hours in (("UTC", 0), ("Asia/Tokyo", 9)):
        local = (start + timedelta(hours=hours)).replace(tzinfo=None)
        asked = {"period": "custom", "zone": zone, "start": local.isoformat(), "end": f"{local.year + 1}-01-01"}
        assert client.get("/v1/usage", params=asked).json()["figures"]["calls"]["value"] == 10
    exact = {"period": "custom", "zone": "Asia/Tokyo", "start": start.isoformat(), "end": "2100-01-01T00:00:00Z"}
    assert client.get("/v1/usage", params={**exact, "end": f"{NOW.year + 1}-01-01T00:00:00Z"}).status_code == 200
    assert client.get("/v1/usage", params=exact).status_code == 400  # longer than ten years


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"period": "aeon"}, "period"),
        ({"zone": "Mars/Olympus"}, "time zone"),
        ({"period": "custom"}, "start and an end"),
        ({"period": "custom", "start": "2026-02-01", "end": "2026-01-01"}, "ends after its start"),
        ({"start": "yesterday"}, "datetime"),
        ({"branches": "main"}, "branches"),
        ({"branch": ["b"] * 51}, "50"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_words(client: TestClient, asked: dict[str, str], said: str) -> None:
    answer = client.get("/v1/usage", params=asked)
    assert answer.status_code in (400, 422) and said in answer.text


def test_files_hold_the_filtered_events(client: TestClient) -> None:
    answer = client.get("/v1/usage.csv", params={"branch": "main"})
    assert len(list(csv.DictReader(io.StringIO(answer.text)))) == 10
    assert answer.headers["content-disposition"] == 'attachment; filename="usage-day.csv"'
    table = pq.read_table(io.BytesIO(client.get("/v1/usage.parquet").content))
    assert set(table["branch"].to_pylist()) == {"main", HOSTILE} and len(table) == 30
    assert client.get("/v1/usage.exe").status_code == 422


def test_prometheus_reads_every_name(client: TestClient) -> None:
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.text.splitlines()
    assert 'moondream_calls_total{branch="main",model="m",skill="recipe",outcome="ok"} 10' in lines
    assert 'moondream_calls_total{branch="a\\"b\\\\c\\nd",model="m",skill="recipe",outcome="ok"} 20' in lines
    assert 'moondream_budget_limit_dollars{branch="main"} 2' in lines
    assert "moondream_usage_events_lost_total 0" in lines
    assert all(line.startswith(("# HELP ", "# TYPE ", "moondream_")) for line in lines)


@pytest.mark.parametrize("path", ["/v1/usage", "/v1/usage.csv", "/v1/usage.parquet", "/metrics"])
def test_a_database_that_is_down_is_an_error_without_its_password(path: str, tmp_path: Path) -> None:
    answer = client_of(Database("postgresql://me:s3cret@127.0.0.1:1/none", 0.1), tmp_path).get(path)
    assert answer.status_code == 503 and "cannot be reached" in answer.text and "s3cret" not in answer.text
