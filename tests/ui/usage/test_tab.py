"""Handlers and snapshots of the Usage tab, with a real database."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import gradio as gr
import pytest
from starlette.datastructures import QueryParams

from access.roles import Role, Visitor
from storage.reward_functions import StoreError
from tests.support.fake_run import HOSTILE
from tests.support.runs import FAKE
from tests.support.usage_cache import building
from training.runs.run import RunConfig
from ui.services import AppServices
from ui.usage import tab
from ui.usage.tab import FIELDS, DashboardFilter, filters_from_link, refresh, refresh_if_open
from ui.usage.view import (
    MAX_LINES,
    MAX_NAME_LENGTH,
    METRICS,
    _format_change,
    format_money,
    format_seconds,
    format_value,
)
from usage.analytics import UsageAnalytics
from usage.budgets import Budget
from usage.events import UsageEvent
from usage.time_window import FilterError

HERE = Path(tab.__file__).parent


@pytest.fixture
def services(tmp_path: Path) -> Iterator[AppServices]:
    """Services with an empty database."""
    services = AppServices.build(tmp_path / "data", f"sqlite:///{tmp_path / 'store.sqlite3'}", FAKE)
    yield services
    services.worker.stop()
    services.meter.recorder.close()


def record(services: AppServices, count: int = 1, seconds_ago: float = 60.0, **changes: Any) -> None:
    """Record `count` equal events."""
    values: dict[str, Any] = {"model": "moondream-tiny", "skill": "recipe", "latency": 0.2, **changes}
    time = datetime.now(timezone.utc) - timedelta(seconds=seconds_ago)
    for _ in range(count):
        services.meter.recorder.record(UsageEvent(time=time, **values))
    services.meter.recorder.flush()


def inputs(**changes: Any) -> dict[str, Any]:
    """Return values of the filter inputs."""
    return {name: getattr(DashboardFilter(**changes), name) for name in FIELDS}


def snapshot(services: AppServices, **changes: Any) -> dict[str, Any]:
    """Return the dashboard's snapshot for these filters."""
    value = refresh(services, None, inputs(**changes))[0]
    assert json.loads(json.dumps(value)) == value
    return value


def metric(value: dict[str, Any], name: str) -> dict[str, Any]:
    return next(item for item in value["metrics"] if item["name"] == name)


@pytest.mark.parametrize("file", ["dashboard.html", "dashboard.js", "time_field.html", "time_field.js"])
def test_template_has_no_placeholders_and_script_inserts_no_html(file: str) -> None:
    """Gradio runs `${...}` in a template as JavaScript."""
    text = (HERE / file).read_text(encoding="utf-8")
    marks = ("{{", "${", "`") if file.endswith("html") else ()
    assert not any(mark in text for mark in marks)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


@pytest.mark.parametrize(
    ("dollars", "text"),
    [
        (0, "$0"),
        (0.000114, "$0.000114"),
        (0.155, "$0.155"),
        (1.5, "$1.50"),
        (1234.5, "$1,234.50"),
        (2e-9, "$0.00000000200"),
    ],
)
def test_format_money_keeps_three_significant_digits(dollars: float, text: str) -> None:
    assert format_money(dollars) == text


@pytest.mark.parametrize(
    ("duration", "text"),
    [(0.0, "0 ms"), (0.0393, "39.3 ms"), (0.66, "660 ms"), (2.034, "2.03 s"), (75.0, "75.0 s"), (1234.0, "1,234 s")],
)
def test_format_seconds(duration: float, text: str) -> None:
    assert format_seconds(duration) == text


def test_unknown_value_is_not_formatted_as_zero() -> None:
    assert {format_value(name, None) for name in METRICS} == {"–"}
    assert format_value("error_rate", 0.0) == "0 %" and format_value("error_rate", 1 / 3) == "33.33 %"


def test_metrics_give_the_change_and_its_trend(services: AppServices) -> None:
    record(services, 4, latency=0.2, cost=0.002, cost_basis="reported")
    record(services, 2, latency=0.4, seconds_ago=2 * 3600.0 - 60)
    value = snapshot(services, period="hour")
    assert metric(value, "Calls") | {"trend": ""} == metric(value, "Calls")
    assert (metric(value, "Calls")["value"], metric(value, "Calls")["change"]) == ("4", "+100.0 %")
    assert metric(value, "Latency p50")["trend"] == "better" and metric(value, "Latency p50")["previous"] == "400 ms"
    assert metric(value, "Cost")["value"] == "$0.00800" and metric(value, "Cost")["change"] == ""
    assert metric(value, "Cost")["previous"] == "" and metric(value, "Cold starts")["previous"] == "0"
    assert value["has_previous"] and value["period"].endswith("Changes are relative to the previous period.")
    week = snapshot(services, period="week")
    assert {item["previous"] for item in week["metrics"]} == {""} and not week["has_previous"], "there were no calls"
    assert week["period"].endswith("No data in the previous period.")
    record(services, 2, latency=0.3985, branch="a", seconds_ago=2 * 3600.0 - 60)
    record(services, 2, latency=0.4, branch="a")
    slower = metric(snapshot(services, period="hour", branches=("a",)), "Latency p50")
    assert (slower["change"], slower["trend"]) == ("+0.4 %", ""), "less than 1 % is neither better nor worse"
    assert [_format_change(change) for change in (-0.0004, 0.0004, -0.1)] == ["±0.0 %", "±0.0 %", "-10.0 %"]


def test_snapshot_is_empty_without_matching_calls(services: AppServices) -> None:
    assert snapshot(services)["empty"] is True
    record(services)
    assert snapshot(services)["empty"] is False and snapshot(services, models=("moondream2",))["empty"] is True


def test_branches_are_compared_and_long_names_are_shortened(services: AppServices) -> None:
    long = "b" * 5_000
    for branch in ("main", HOSTILE, long, "مرحبا"):
        record(services, branch=branch)
    value = snapshot(services, branches=("main", HOSTILE))
    assert [row["name"] for row in value["branches"]] == ["main", HOSTILE]
    assert all(len(row["cells"]) == len(value["columns"]) for row in value["branches"])
    assert len(snapshot(services)["branches"]) == 4 and not snapshot(services, branches=("main",))["branches"]
    names = [line["name"] for line in snapshot(services)["charts"][0]["lines"]]
    assert HOSTILE in names and max(map(len, names)) <= max(MAX_NAME_LENGTH, len(HOSTILE))
    shown = refresh(services, None, inputs())[-1]
    assert long in shown.options.branches, "the filter takes the whole name"
    assert metric(snapshot(services, branches=(long,)), "Calls")["value"] == "1"


def test_table_says_whether_a_branch_is_cheaper_and_better_than_main(services: AppServices) -> None:
    record(services, 2, branch="main", cost=0.02, cost_basis="reported", reward=0.5)
    record(services, 3, branch="topic", cost=0.015, cost_basis="reported", reward=0.6)
    value = snapshot(services)
    assert value["verdict"] == (
        "topic is 25.0 % cheaper per request and 20.0 % higher in reward than main. Changes are relative to main."
    )
    main, topic = value["branches"]
    assert main["name"] == "main" and [cell["change"] for cell in main["cells"]] == [""] * 5
    cells = dict(zip(value["columns"], topic["cells"], strict=True))
    assert cells["Calls"] == {"value": "3", "change": "+50.0 %", "trend": ""}
    assert cells["Cost per request"] == {"value": "$0.0150", "change": "-25.0 %", "trend": "better"}
    assert cells["Reward per cent"] == {"value": "0.400", "change": "+60.0 %", "trend": "better"}


@pytest.mark.parametrize(("calls", "trend"), [(100, ""), (1_000, "worse")])
def test_difference_of_error_rates_that_chance_explains_is_not_worse(
    services: AppServices, calls: int, trend: str
) -> None:
    for branch, failed in {"main": calls // 50, "topic": calls // 25}.items():
        record(services, calls - failed, branch=branch)
        record(services, failed, branch=branch, outcome="error")
    value = snapshot(services)
    cells = dict(zip(value["columns"], value["branches"][1]["cells"], strict=True))
    assert cells["Error rate"] == {"value": "4.00 %", "change": "+100.0 %", "trend": trend}


def test_first_errors_of_a_branch_are_worse_than_none(services: AppServices) -> None:
    record(services, 20, branch="main")
    record(services, 20, branch="topic", outcome="error")
    value = snapshot(services)
    cells = dict(zip(value["columns"], value["branches"][1]["cells"], strict=True))
    assert cells["Error rate"] == {"value": "100 %", "change": "from 0 %", "trend": "worse"}


def test_models_appear_by_title_and_runs_by_name(services: AppServices) -> None:
    config = RunConfig(base="moondream-tiny", reward={"sharpness": 1.0}, seed=1, name="Crisper")
    run = services.runs.create(config)
    record(services, adapter=run.id, source="fine-tune")
    record(services, model=f"run-{run.id}", adapter=f"run-{run.id}", cost=1.0, cost_basis="reported")
    record(services, model="moondream2", adapter="20260101-000000-abcdef", seconds_ago=90.0)
    value = snapshot(services, by="model")
    models = [row[2] for row in value["recent"]]
    assert sorted(models[:2]) == ["Crisper", "moondream-tiny · Crisper"]
    assert models[2] == "Moondream 2 · Deleted run 20260101-000000-abcdef"
    assert value["recent_runs"] == [run.id, run.id, ""]
    assert {line["name"] for line in value["charts"][0]["lines"]} == {"Crisper", "moondream-tiny", "Moondream 2"}
    assert {bar["run"] for bar in value["cost_per_model"]} == {run.id, ""}
    choices = refresh(services, None, inputs())[2]["choices"]
    assert ("Crisper", f"run-{run.id}") in choices and ("Moondream 2", "moondream2") in choices


def test_machine_price_counts_from_now_on_and_back(services: AppServices) -> None:
    assert snapshot(services)["machine"]["text"].startswith("Not known")
    record(services, latency=3.6)
    run = services.runs.create(RunConfig(base="moondream-tiny", reward={"sharpness": 1.0}, seed=1, backend="jobs"))
    record(services, latency=3.6, adapter=run.id, source="fine-tune")  # on another machine
    record(services, model="moondream-cloud", latency=3.6)

    def submit(**data: Any) -> str:
        return tab.update_machine_price(services, gr.EventData(None, data))

    assert "1 past call" in submit(action="set", dollars="0.5", past=True)
    value = snapshot(services)
    assert metric(value, "Cost")["value"] == "$0.000500" and "The cost of 1 call is estimated" in " ".join(
        value["notes"]
    )
    assert value["machine"]["text"].startswith("$0.500 an hour, set here") and value["machine"]["is_set"]
    assert services.meter.machine_cost(3600) == 0.5
    for data, message in (({"dollars": "much"}, "number of US dollars"), ({"dollars": "-1"}, "from 0 to")):
        with pytest.raises(gr.Error, match=message):
            submit(action="set", **data)
    submit(action="remove")
    assert services.meter.machine_cost(3600) is None


def test_exceeded_limit_is_shown_and_removed(services: AppServices) -> None:
    record(services, 12, cost=1.0, cost_basis="reported", branch=HOSTILE)

    def submit(**data: Any) -> None:
        tab.update_alert(services, gr.EventData(None, data))

    submit(action="set", branch=f" {HOSTILE} ", measure="cost", limit="5")
    submit(action="set", branch="", measure="error_rate", limit="50")
    value = snapshot(services)["alerts"]
    every, hostile = value["alerts"]
    assert every["text"] == "error rate of the last hour: limit 50.00 %, last 0 %" and not every["exceeded"]
    assert hostile["text"].startswith("spend of the last day: limit $5.00, last $12.00 · exceeded since ")
    assert hostile["name"] == HOSTILE and hostile["exceeded"] and "ALERT_WEBHOOK_URL" in value["text"]
    for data, message in (({"measure": "cost", "limit": "x"}, "number"), ({"measure": "calls"}, "measure must be")):
        with pytest.raises(gr.Error, match=message):
            submit(action="set", **data)
    submit(action="remove", branch=HOSTILE, measure="cost")
    assert [alert["measure"] for alert in snapshot(services)["alerts"]["alerts"]] == ["error_rate"]


def test_smallest_lines_are_added_up_and_charts_share_their_order(services: AppServices) -> None:
    for index in range(12):
        record(services, 12 - index, branch=f"b{index}", cost=0.001, cost_basis="reported")
    calls, _, cost = snapshot(services)["charts"]
    assert [line["name"] for line in calls["lines"]] == [*(f"b{n}" for n in range(MAX_LINES - 1)), "5 others, total"]
    assert [line["name"] for line in cost["lines"]] == [line["name"] for line in calls["lines"]]
    assert sum(value or 0 for line in calls["lines"] for value in line["values"]) == sum(range(1, 13))


def test_errors_rewards_and_unknown_prices_are_in_the_snapshot(services: AppServices) -> None:
    record(services, 2, outcome="error", error="provider")
    record(services, reward=0.5, model="other", cost=0.01, cost_basis="estimated")
    value = snapshot(services)
    assert value["errors"] == [{"name": "provider", "fraction": 1.0, "text": "2"}]
    assert {bar["name"]: bar["text"] for bar in value["cost_per_model"]} == {
        "moondream-tiny": "unknown",
        "other": "$0.0100",
    }
    points = {point["name"]: point for point in value["scatter"]}
    assert points["other"]["y"] == 0.5 and points["moondream-tiny"]["y"] is None
    assert any("no known price" in note for note in value["notes"])
    assert any("estimated" in note for note in value["notes"])
    assert value["recent"][0][7] in ("$0.0100 (estimated)", "–")


def test_custom_period_is_in_local_time_of_its_zone() -> None:
    query = DashboardFilter(
        period="custom", zone="Asia/Kathmandu", start="2026-11-23 12:00:00", end="2026-11-23 18:00"
    ).to_query()
    assert query.start is not None and query.start.astimezone(timezone.utc).hour == 6
    with pytest.raises(FilterError, match="2026-11-23 18:00"):
        DashboardFilter(period="custom", start="yesterday", end="2026-11-23").to_query()


@pytest.mark.parametrize(
    "changes",
    [{"period": "custom", "start": "2026-11-23"}, {"period": "aeon"}, {"period": "custom", "start": "x", "end": "y"}],
)
def test_invalid_filter_shows_an_error(services: AppServices, changes: dict[str, Any]) -> None:
    assert len(snapshot(services, **changes)["error"]) > 20


def test_unreachable_database_shows_an_error(services: AppServices, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise StoreError("database", "The database cannot be reached.")

    monkeypatch.setattr(UsageAnalytics, "options", fail)
    assert snapshot(services) == {"error": "The database cannot be reached."}


def test_progress_is_shown_while_the_events_are_read(services: AppServices, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot(services)
    record(services, 5)
    with building(services.usage.cache, monkeypatch) as finish:
        shown = snapshot(services)
        assert shown["notice"] and "are being read: 2 of 5" in shown["error"]
        finish()
        assert metric(snapshot(services), "Calls")["value"] == "5"


def test_custom_period_begins_as_the_period_that_was_shown(services: AppServices) -> None:
    record(services, seconds_ago=3 * 86400)
    week = refresh(services, None, inputs(period="week", zone="Asia/Tokyo"))
    assert all(date == gr.skip() for date in week[4:6])
    value, *_, start, end, shown = refresh(services, week[-1], inputs(period="custom", zone="Asia/Tokyo"))
    assert metric(value, "Calls")["value"] == "1"
    assert value["filter"] == {"period": "custom", "start": start, "end": end}
    assert datetime.fromisoformat(end) - datetime.fromisoformat(start) == timedelta(days=7)
    tokyo = datetime.fromisoformat(end).replace(tzinfo=ZoneInfo("Asia/Tokyo"))
    assert abs((tokyo - datetime.now(timezone.utc)).total_seconds()) < 60
    later = refresh(services, shown, inputs(period="custom", zone="Asia/Tokyo", start=start, end=end))
    assert "error" not in later[0] and all(date == gr.skip() for date in later[4:6]), "entered dates stay"
    linked = refresh(services, None, inputs(period="custom"))
    assert datetime.fromisoformat(linked[5]) - datetime.fromisoformat(linked[4]) == timedelta(days=1)
    assert "needs a start and an end" in refresh(services, shown, inputs(period="custom", start=start))[0]["error"]


def test_nothing_is_refreshed_while_the_tab_is_closed(services: AppServices) -> None:
    updates = refresh_if_open(services, False, None, inputs())
    assert len(updates) == 7 and all(update == gr.skip() for update in updates)


class FakeRequest:
    """A request with query parameters."""

    def __init__(self, query: str) -> None:
        self.query_params = QueryParams(query)


def linked(query: str, zone: str = "Europe/Berlin") -> dict[str, Any]:
    return filters_from_link(FakeRequest(query), zone)  # type: ignore[arg-type]


def test_link_sets_every_filter_and_opens_the_tab() -> None:
    values = linked("usage.period=week&usage.branches=a%2Cb&usage.branches=c&usage.by=model&usage.zone=Asia%2FTokyo")
    assert set(values) == {*FIELDS, "tabs", "tab_open"}
    assert values["branches"] == ["a,b", "c"] and (values["period"], values["by"]) == ("week", "model")
    assert values["zone"] == "Asia/Tokyo" and values["tab_open"] and values["tabs"].selected == tab.TAB
    assert DashboardFilter.from_inputs(values).branches == ("a,b", "c")


@pytest.mark.parametrize("query", ["", "models=moondream-tiny&n=2"])
def test_link_without_filters_sets_only_the_browsers_time_zone(query: str) -> None:
    assert linked(query) == {"zone": "Europe/Berlin"}
    assert linked(query, "Mars/Olympus") == {"zone": "UTC"}


def test_invalid_filters_of_a_link_become_the_defaults() -> None:
    values = linked(f"usage.period={HOSTILE[:20]}&usage.by=drop&usage.zone=../etc/passwd&" + "usage.models=x&" * 500)
    assert (values["period"], values["by"], values["zone"]) == ("day", "branch", "UTC")
    assert len(values["models"]) == tab.MAX_NAMES


def test_span_of_a_chart_becomes_the_period_and_can_be_undone(services: AppServices) -> None:
    record(services)

    def select(zone: str = "UTC", **data: Any) -> tuple[Any, ...]:
        return tab.period_selected(gr.EventData(None, data), zone)

    start = datetime(2026, 11, 23, 6, tzinfo=timezone.utc).timestamp()
    period = select("Asia/Kathmandu", start=start, end=start + 3600)
    assert period == ("custom", "2026-11-23T11:45:00", "2026-11-23T12:45:00")
    query = DashboardFilter(zone="Asia/Kathmandu", **dict(zip(tab.PERIOD_FIELDS, period, strict=True))).to_query()
    assert query.start is not None and query.start.timestamp() == start
    assert select(**dict(zip(tab.PERIOD_FIELDS, period, strict=True))) == period
    earlier = snapshot(services, period="week")["filter"]
    assert earlier == {"period": "week", "start": None, "end": None} and select(**earlier)[0] == "week"
    for data in ({}, {"start": "x", "end": 1}, {"start": 1e30, "end": 1}, {"period": HOSTILE}, {"period": "custom"}):
        with pytest.raises(gr.Error, match="Choose another one"):
            select(**data)


def test_bins_of_charts_are_in_the_time_zone_and_gaps_are_null(services: AppServices) -> None:
    record(services, seconds_ago=3600)
    value = snapshot(services, period="day", zone="Asia/Kathmandu")
    calls, latency, cost = value["charts"]
    assert value["zone"] == "Asia/Kathmandu" and all(start % 3600 == 900 for start in value["bins"])
    assert value["bins"] == sorted(value["bins"]) and value["bins"][-1] < value["end"]
    assert [len(line["values"]) for line in latency["lines"]] == [len(value["bins"])] * 3
    assert sum(calls["lines"][0]["values"]) == 1 and latency["lines"][0]["values"].count(None) == len(value["bins"]) - 1
    assert (calls["label"], latency["unit"], cost["label"]) == ("calls per hour", "s", "US dollars per hour")
    assert cost["max_text"] == "" and latency["max_text"] == "200 ms"


def test_budget_is_set_shown_and_removed(services: AppServices) -> None:
    def click(**data: Any) -> None:
        tab.update_budget(services, gr.EventData(None, data))

    click(action="set", branch=" main ", limit="0.01", stop=True)
    record(services, branch="main", cost=0.009, cost_basis="reported")
    budgets = snapshot(services)["budgets"]
    assert [(budget["name"], budget["state"], budget["stop"]) for budget in budgets] == [("main", "warning", True)]
    assert budgets[0]["text"].startswith("$0.00900 of $0.0100 this month (UTC), 90 %")
    click(action="remove", branch="main")
    assert snapshot(services)["budgets"] == []
    for limit in ("", "-1", "nan", "inf", "much", None):
        with pytest.raises(gr.Error):
            click(action="set", branch="main", limit=limit)
    assert services.budgets.list() == ()
    services.budgets.set(Budget(HOSTILE, 5))
    assert snapshot(services)["budgets"][0]["name"] == HOSTILE


def test_sample_traffic_is_recorded_calls_of_the_built_in_model(services: AppServices) -> None:
    list(tab.generate_sample_traffic(services))
    value = snapshot(services)
    assert int(metric(value, "Calls")["value"]) == 2 * len(tab.SAMPLE_SKILLS)
    assert int(metric(value, "Tokens")["value"].replace(",", "")) > 100
    assert {row[3] for row in value["recent"]} == set(tab.SAMPLE_SKILLS)


@pytest.mark.parametrize("role", [Role.GUEST, Role.USER])
def test_only_administrators_see_usage(services: AppServices, role: Role) -> None:
    shown, *rest = refresh(services, None, inputs(), Visitor(role, "hf:1"))
    assert shown == {"error": tab.ADMINS_SEE_USAGE, "notice": True}
    assert rest == [gr.skip()] * 5 + [None]
    assert "metrics" not in shown and "notice" not in refresh(services, None, inputs())[0]
