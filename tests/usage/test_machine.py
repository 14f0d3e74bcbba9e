"""Tests of the machine's price: set or from the table, for new calls and for past calls without a price."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from storage.database import Database
from usage.analytics import UsageAnalytics
from usage.events import UsageEvent
from usage.machine import MachinePrice, MachinePriceError
from usage.prices import Prices
from usage.recorder import insert_events
from usage.time_window import UsageFilter

NOW = datetime(2026, 11, 20, 12, 30, tzinfo=timezone.utc)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    """Return an empty database of each kind."""
    file_url = f"sqlite:///{tmp_path / 'usage.sqlite3'}"
    return Database(file_url if request.param == "sqlite" else request.getfixturevalue("postgres_url"))


def machine_price(database: Database, hardware: str | None = None, machine: str = "laptop") -> MachinePrice:
    return MachinePrice(database, Prices(), hardware, machine)


def test_price_is_stored_per_machine_and_replaces_that_of_the_table(database: Database) -> None:
    price = machine_price(database, "cpu-upgrade")
    assert price.per_hour == 0.03 and not price.is_set and price.cost(3600) == pytest.approx(0.03)
    price.set(0.9)
    assert price.cost(10) == pytest.approx(0.0025) and price.is_set
    assert machine_price(database).per_hour == 0.9 and machine_price(database, None, "other").per_hour is None
    price.set(None)
    assert price.per_hour == 0.03 and machine_price(database).cost(1) is None
    for invalid in (-1.0, float("nan"), float("inf"), 1e9):
        with pytest.raises(MachinePriceError, match="from 0 to"):
            price.set(invalid)
    assert [suggestion.dollars for suggestion in price.suggestions()] == [0.0, 0.03, pytest.approx(0.012)]


def test_unreachable_database_does_not_fail_a_call() -> None:
    database = Database("postgresql://nobody@127.0.0.1:1/none", 0.1)
    assert machine_price(database, "cpu-upgrade").cost(3600) == pytest.approx(0.03)


def test_past_calls_of_local_models_without_a_price_are_priced_as_estimates(database: Database) -> None:
    def event(number: int, **values: object) -> UsageEvent:
        time = NOW - timedelta(minutes=40 * number)
        return UsageEvent(time, "local", "recipe", latency=7.2, id=f"e{number}", **values)  # type: ignore[arg-type]

    analytics = UsageAnalytics(database)
    others = [
        event(3, outcome="error"),
        event(4, space="team/space"),
        event(5, payer="visitor"),
        event(6, cost=1.0, cost_basis="reported"),
        UsageEvent(NOW, "hosted", "recipe", latency=7.2, id="hosted"),
    ]
    insert_events(database, [event(0), event(1), event(2, branch="topic"), *others])
    usage_filter = UsageFilter("custom", start=NOW - timedelta(days=1), end=NOW + timedelta(days=1))
    assert analytics.metrics(usage_filter).cost.value == 1.0  # the cache has the events before they are priced
    price = machine_price(database)
    with pytest.raises(MachinePriceError, match="Set a price"):
        price.price_past_events("", lambda model, adapter: True)
    price.set(0.5)
    assert price.price_past_events("", lambda model, adapter: model == "local") == 3
    metrics = analytics.metrics(usage_filter)
    assert metrics.cost.value == pytest.approx(1.003) and metrics.estimated == 3 and metrics.unpriced == 4
    priced = {
        event.id: (event.cost, event.cost_basis) for event in analytics.recent(usage_filter, now=NOW) if event.cost
    }
    assert priced == {"e6": (1.0, "reported"), **dict.fromkeys(("e0", "e1", "e2"), (0.001, "estimated"))}
    assert price.price_past_events("", lambda model, adapter: model == "local") == 0
    insert_events(database, [event(0)])  # delivered again: still one event
    assert analytics.metrics(usage_filter).calls.value == 8
