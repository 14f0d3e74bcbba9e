"""The Usage tab's handlers and words, on a real store."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from starlette.datastructures import QueryParams

from storage.reward_functions import StoreError
from tests.training.runs.test_queue import FAKE
from ui.services import AppServices
from ui.usage import tab as dashboard
from ui.usage import view as dashboard_view
from ui.usage.tab import FIELDS, DashboardFilter, from_link, look, looked
from ui.usage.view import LINES, NAME, money, seconds, words
from usage.analytics import Usage
from usage.budgets import Budget
from usage.events import Event
from usage.time_window import FilterError

HERE = Path(dashboard.__file__).parent
HOSTILE = "<img src=x onerror=window.hacked=1>${window.hacked=2}{{constructor}}"


@pytest.fixture
def services(tmp_path: Path) -> Iterator[AppServices]:
    made = AppServices.open(tmp_path / "data", f"sqlite:///{tmp_path / 'store.sqlite3'}", FAKE)
    yield made
    made.worker.stop()
    made.meter.recorder.close()


def record(services: AppServices, count: int = 1, **changes: Any) -> None:
    values: dict[str, Any] = {"model": "moondream-tiny", "skill": "recipe", "latency": 0.2, **changes}
    ago = values.pop("ago", 60.0)
    for _ in range(count):
        services.meter.recorder.record(Event(time=datetime.now(timezone.utc) - timedelta(seconds=ago), **values))
    services.meter.recorder.flush()


def ask(services: AppServices, **changes: Any) -> dict[str, Any]:
    """What the page is given for these filters."""
    value = look(services, None, *[getattr(DashboardFilter(**changes), name) for name in FIELDS])[0]
    assert json.loads(json.dumps(value)) == value
    return value


def figure(value: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in value["figures"] if one["name"] == name)


@pytest.mark.parametrize("file", ["dashboard.html", "dashboard.js"])
def test_no_name_can_become_code(file: str) -> None:
    """Gradio would run `${...}` of a template as JavaScript; and what is drawn goes in as text."""
    text = (HERE / file).read_text(encoding="utf-8")
    marks = ("{{", "${", "`") if file.endswith("html") else ()
    assert not any(mark in text for mark in marks)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


@pytest.mark.parametrize(
    ("dollars", "told"),
    [
        (0, "$0"),
        (0.000114, "$0.000114"),
        (0.155, "$0.155"),
        (1.5, "$1.50"),
        (1234.5, "$1,234.50"),
        (2e-9, "$0.00000000200"),
    ],
)
def test_money_has_the_digits_that_make_it_true(dollars: float, told: str) -> None:
    assert money(dollars) == told


@pytest.mark.parametrize(
    ("value", "told"),
    [(0.0, "0 ms"), (0.0393, "39.3 ms"), (0.66, "660 ms"), (2.034, "2.03 s"), (75.0, "75.0 s"), (1234.0, "1,234 s")],
)
def test_durations_have_their_unit(value: float, told: str) -> None:
    assert seconds(value) == told


def test_what_is_not_known_is_not_zero() -> None:
    assert {words(name, None) for name in dashboard_view.FIGURES} == {"–"}
    assert words("error_rate", 0.0) == "0 %" and words("error_rate", 1 / 3) == "33.33 %"


def test_figures_say_what_changed_and_whether_that_is_good(services: AppServices) -> None:
    record(services, 4, latency=0.2, cost=0.002, cost_basis="reported")
    record(services, 2, latency=0.4, ago=2 * 3600.0 - 60)
    value = ask(services, period="hour")
    assert figure(value, "Calls") | {"judged": ""} == figure(value, "Calls")
    assert (figure(value, "Calls")["value"], figure(value, "Calls")["change"]) == ("4", "+100.0 %")
    assert figure(value, "Latency p50")["judged"] == "better" and figure(value, "Latency p50")["before"] == "400 ms"
    assert figure(value, "Cost")["value"] == "$0.00800" and figure(value, "Cost")["change"] == ""
    assert not value["quiet"] and value["period"].endswith("before.")


def test_a_quiet_period_is_said_to_be_one(services: AppServices) -> None:
    assert ask(services)["quiet"] is True
    record(services)
    assert ask(services)["quiet"] is False and ask(services, models=("moondream2",))["quiet"] is True


def test_branches_are_compared_side_by_side_and_names_are_text(services: AppServices) -> None:
    long = "b" * 5_000
    for branch in ("main", HOSTILE, long, "مرحبا"):
        record(services, branch=branch)
    value = ask(services, branches=("main", HOSTILE))
    assert [row["name"] for row in value["branches"]] == ["main", HOSTILE]
    assert all(len(row["cells"]) == len(value["heads"]) for row in value["branches"])
    shown = [line["name"] for line in ask(services)["charts"][0]["lines"]]
    assert HOSTILE in shown and max(map(len, shown)) <= max(NAME, len(HOSTILE))
    options = look(services, None, *[getattr(DashboardFilter(), name) for name in FIELDS])[4]
    assert long in options.branches, "the filter takes the whole name"
    assert figure(ask(services, branches=(long,)), "Calls")["value"] == "1"


def test_many_lines_become_few_that_add_up_and_keep_their_colour(services: AppServices) -> None:
    for place in range(12):
        record(services, 12 - place, branch=f"b{place}", cost=0.001, cost_basis="reported")
    calls, _, cost = ask(services)["charts"]
    assert [line["name"] for line in calls["lines"]] == [*(f"b{n}" for n in range(LINES - 1)), "5 others"]
    assert [line["name"] for line in cost["lines"]] == [line["name"] for line in calls["lines"]]
    assert sum(value or 0 for line in calls["lines"] for value in line["values"]) == sum(range(1, 13))


def test_errors_rewards_and_unknown_prices_are_shown(services: AppServices) -> None:
    record(services, 2, outcome="error", error="provider")
    record(services, reward=0.5, model="other", cost=0.01, cost_basis="estimated")
    value = ask(services)
    assert value["errors"] == [{"name": "provider", "share": 1.0, "words": "2"}]
    assert {one["name"]: one["words"] for one in value["amounts"]} == {"moondream-tiny": "unknown", "other": "$0.0100"}
    dots = {dot["name"]: dot for dot in value["dots"]}
    assert dots["other"]["y"] == 0.5 and dots["moondream-tiny"]["y"] is None
    assert any("no known price" in note for note in value["notes"])
    assert any("estimated" in note for note in value["notes"])
    assert value["recent"][0][7] in ("$0.0100 (estimated)", "–")


def test_a_custom_period_is_on_the_walls_clock_of_its_zone() -> None:
    wanted = DashboardFilter(
        period="custom", zone="Asia/Kathmandu", start="2026-11-23 12:00:00", end="2026-11-23 18:00"
    ).filter()
    assert wanted.start is not None and wanted.start.astimezone(timezone.utc).hour == 6
    with pytest.raises(FilterError, match="2026-11-23 18:00"):
        DashboardFilter(period="custom", start="yesterday", end="2026-11-23").filter()


@pytest.mark.parametrize(
    "changes", [{"period": "custom"}, {"period": "aeon"}, {"period": "custom", "start": "x", "end": "y"}]
)
def test_a_filter_that_cannot_be_says_why_in_the_page(services: AppServices, changes: dict[str, Any]) -> None:
    assert len(ask(services, **changes)["error"]) > 20


def test_a_database_that_is_down_is_said_in_the_page(services: AppServices, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*_: Any, **__: Any) -> None:
        raise StoreError("database", "The database cannot be reached.")

    monkeypatch.setattr(Usage, "options", down)
    assert ask(services) == {"error": "The database cannot be reached."}


def test_nothing_is_computed_while_the_tab_is_closed(services: AppServices) -> None:
    shown = looked(services, False, None, *[getattr(DashboardFilter(), name) for name in FIELDS])
    assert all(part == gr.skip() for part in shown)


class Address:
    """As much of a request as a handler reads."""

    def __init__(self, query: str) -> None:
        self.query_params = QueryParams(query)


def linked(query: str, zone: str = "Europe/Berlin") -> tuple[dict[str, Any], Any, Any]:
    *values, tab, here = from_link(Address(query), zone)  # type: ignore[arg-type]
    return dict(zip(FIELDS, values, strict=True)), tab, here


def test_the_address_carries_every_filter() -> None:
    values, tab, here = linked(
        "usage.period=week&usage.branches=a%2Cb&usage.branches=c&usage.by=model&usage.zone=Asia%2FTokyo"
    )
    assert values["branches"] == ["a,b", "c"] and (values["period"], values["by"]) == ("week", "model")
    assert values["zone"] == "Asia/Tokyo" and here and tab.selected == dashboard.TAB
    assert DashboardFilter.of([values[name] for name in FIELDS]).branches == ("a,b", "c")


@pytest.mark.parametrize("query", ["", "models=moondream-tiny&n=2"])
def test_another_address_opens_another_tab_in_the_browsers_zone(query: str) -> None:
    values, tab, here = linked(query)
    assert values["zone"] == "Europe/Berlin" and here == tab == gr.skip()
    assert linked(query, "Mars/Olympus")[0]["zone"] == "UTC"


def test_a_hostile_address_is_left_at_defaults() -> None:
    values, _, _ = linked(
        f"usage.period={HOSTILE[:20]}&usage.by=drop&usage.zone=../etc/passwd&" + "usage.models=x&" * 500
    )
    assert (values["period"], values["by"], values["zone"]) == ("day", "branch", "UTC")
    assert len(values["models"]) == dashboard.MANY


def test_a_budget_is_set_shown_and_removed(services: AppServices) -> None:
    def click(**data: Any) -> None:
        dashboard.budget(services, gr.EventData(None, data))

    click(do="set", branch=" main ", limit="0.01", stop=True)
    record(services, branch="main", cost=0.009, cost_basis="reported")
    shown = ask(services)["budgets"]
    assert [(one["name"], one["state"], one["stop"]) for one in shown] == [("main", "warning", True)]
    assert shown[0]["words"].startswith("$0.00900 of $0.0100 this month (UTC), 90 %")
    click(do="remove", branch="main")
    assert ask(services)["budgets"] == []
    for limit in ("", "-1", "nan", "inf", "much", None):
        with pytest.raises(gr.Error):
            click(do="set", branch="main", limit=limit)
    assert services.budgets.list() == ()
    services.budgets.set(Budget(HOSTILE, 5))
    assert ask(services)["budgets"][0]["name"] == HOSTILE


def test_the_demonstration_load_is_real_calls_of_the_embedded_model(services: AppServices) -> None:
    list(dashboard.demonstrate(services))
    value = ask(services)
    assert int(figure(value, "Calls")["value"]) == 2 * len(dashboard.DEMONSTRATION)
    assert int(figure(value, "Tokens")["value"].replace(",", "")) > 100
    assert {row[3] for row in value["recent"]} == set(dashboard.DEMONSTRATION)
