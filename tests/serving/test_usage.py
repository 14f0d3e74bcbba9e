"""Tests of the usage routes: metrics as JSON, events as files, Prometheus, invalid queries, an unreachable database."""

import csv
import io
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from serving import usage
from storage.database import Database
from tests.support.usage_cache import building
from usage.analytics import UsageAnalytics
from usage.budgets import Budget, Budgets
from usage.events import Deployment, UsageEvent
from usage.recorder import Recorder, insert_events

NOW = datetime.now(timezone.utc)
HOSTILE_NAME = 'a"b\\c\nd'


def create_client(database: Database, folder: Path, analytics: UsageAnalytics | None = None) -> TestClient:
    recorder = Recorder(database, folder / "spool", Deployment())
    app = FastAPI()
    app.include_router(usage.router(analytics or UsageAnalytics(database), Budgets(database), recorder))
    return TestClient(app)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """Return a client of thirty calls in the last half hour: ten on main at a cent each, twenty on a hostile branch."""
    folder = tmp_path_factory.mktemp("usage")
    database = Database(f"sqlite:///{folder / 'usage.sqlite3'}")
    insert_events(
        database,
        [
            UsageEvent(
                NOW - timedelta(minutes=n),
                "m",
                "recipe",
                latency=n / 10,
                branch="main" if n < 10 else HOSTILE_NAME,
                cost=0.01 if n < 10 else None,
                cost_basis="reported" if n < 10 else "unknown",
            )
            for n in range(30)
        ],
    )
    Budgets(database).set(Budget("main", 2.0))
    yield create_client(database, folder)


def test_metrics_have_units_and_unknown_costs_are_counted(client: TestClient) -> None:
    report = client.get("/v1/usage").json()
    assert report["figures"]["calls"] == {"value": 30, "before": 0, "change": None, "unit": "calls"}
    assert report["figures"]["cost"]["value"] == pytest.approx(0.1) and report["calls_without_known_cost"] == 20
    hostile = client.get("/v1/usage", params={"branch": HOSTILE_NAME, "model": "m"}).json()["figures"]
    assert hostile["calls"]["value"] == 20 and hostile["cost"]["value"] is None
    both = client.get("/v1/usage", params={"branch": ["main", HOSTILE_NAME]}).json()["figures"]
    assert both["calls"]["value"] == 30


def test_time_without_an_offset_is_local_to_the_zone(client: TestClient) -> None:
    start = NOW - timedelta(minutes=9.5)
    for zone, hours in (("UTC", 0), ("Asia/Tokyo", 9)):
        local = (start + timedelta(hours=hours)).replace(tzinfo=None)
        params = {"period": "custom", "zone": zone, "start": local.isoformat(), "end": f"{local.year + 1}-01-01"}
        assert client.get("/v1/usage", params=params).json()["figures"]["calls"]["value"] == 10
    params = {"period": "custom", "zone": "Asia/Tokyo", "start": start.isoformat(), "end": "2100-01-01T00:00:00Z"}
    assert client.get("/v1/usage", params={**params, "end": f"{NOW.year + 1}-01-01T00:00:00Z"}).status_code == 200
    assert client.get("/v1/usage", params=params).status_code == 400  # longer than ten years


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"period": "aeon"}, "period"),
        ({"zone": "Mars/Olympus"}, "time zone"),
        ({"period": "custom"}, "start and an end"),
        ({"period": "custom", "start": "2026-02-01", "end": "2026-01-01"}, "end after its start"),
        ({"start": "yesterday"}, "datetime"),
        ({"branches": "main"}, "branches"),
        ({"branch": ["b"] * 51}, "50"),
    ],
)
def test_invalid_filter_is_rejected_with_the_reason(client: TestClient, params: dict[str, str], message: str) -> None:
    response = client.get("/v1/usage", params=params)
    assert response.status_code in (400, 422) and message in response.text


def test_files_contain_the_filtered_events(client: TestClient) -> None:
    response = client.get("/v1/usage.csv", params={"branch": "main"})
    assert len(list(csv.DictReader(io.StringIO(response.text)))) == 10
    assert response.headers["content-disposition"] == 'attachment; filename="usage-day.csv"'
    table = pq.read_table(io.BytesIO(client.get("/v1/usage.parquet").content))
    assert set(table["branch"].to_pylist()) == {"main", HOSTILE_NAME} and len(table) == 30
    assert client.get("/v1/usage.exe").status_code == 422


def test_prometheus_metrics_can_be_parsed(client: TestClient) -> None:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families.values()
        for sample in family.samples
    }
    labels = (("model", "m"), ("outcome", "ok"), ("skill", "recipe"))
    assert samples[("moondream_calls_total", ("branch", "main"), *labels)] == 10
    assert samples[("moondream_calls_total", ("branch", HOSTILE_NAME), *labels)] == 20
    assert samples[("moondream_cost_dollars_total", ("branch", "main"), *labels)] == pytest.approx(0.1)
    assert samples[("moondream_unpriced_calls_total", ("branch", HOSTILE_NAME), *labels)] == 20
    assert samples[("moondream_latency_seconds_total", ("branch", "main"), *labels)] == pytest.approx(4.5)
    assert samples[("moondream_tokens_total", ("branch", "main"), *labels)] == 0
    assert samples["moondream_budget_limit_dollars", ("branch", "main")] == 2
    assert ("moondream_budget_spent_dollars", ("branch", "main")) in samples
    assert samples[("moondream_usage_events_lost_total",)] == 0
    assert {name for name, *_ in samples} == {
        *(f"moondream_{name}_total" for name in ("calls", "latency_seconds", "tokens", "cost_dollars")),
        *(f"moondream_{name}_total" for name in ("unpriced_calls", "usage_events_lost")),
        *(f"moondream_{name}_total" for name in ("queue_seconds", "cold_starts", "cold_start_seconds")),
        *(f"moondream_budget_{name}_dollars" for name in ("limit", "spent")),
        *(f"moondream_call_duration_seconds_{name}" for name in ("bucket", "count", "sum")),
    }
    duration = ("moondream_call_duration_seconds_bucket", ("branch", "main"))
    assert samples[(*duration, ("le", "0.5"), labels[0], labels[2])] == 6
    assert samples[(*duration, ("le", "+Inf"), labels[0], labels[2])] == 10
    types = {name: family.type for name, family in families.items()}
    assert types["moondream_calls"] == "counter" and types["moondream_budget_limit_dollars"] == "gauge"
    assert all(line.startswith(("# HELP ", "# TYPE ", "moondream_")) for line in response.text.splitlines())


PATHS = ["/v1/usage", "/v1/usage.csv", "/v1/usage.parquet", "/metrics"]


def test_request_does_not_wait_until_the_cache_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(f"sqlite:///{tmp_path / 'usage.sqlite3'}")
    insert_events(database, [UsageEvent(NOW - timedelta(minutes=n), "m", "recipe") for n in range(5)])
    analytics = UsageAnalytics(database)
    client = create_client(database, tmp_path, analytics)
    with building(analytics.cache, monkeypatch) as finish:
        for response in map(client.get, PATHS):
            assert response.status_code == 503 and "2 of 5" in response.json()["detail"]
            assert response.headers["Retry-After"] == "5"
        finish()
        assert {client.get(path).status_code for path in PATHS} == {200}


@pytest.mark.parametrize("path", PATHS)
def test_unreachable_database_is_reported_without_its_password(path: str, tmp_path: Path) -> None:
    client = create_client(Database("postgresql://me:s3cret@127.0.0.1:1/none", 0.1), tmp_path)
    response = client.get(path)
    assert response.status_code == 503 and "cannot be reached" in response.text and "s3cret" not in response.text
