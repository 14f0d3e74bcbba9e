"""The Usage tab: number, latency, tokens and cost of model calls per branch, model, skill and outcome."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from string import Template
from threading import Event
from typing import Any
from zoneinfo import ZoneInfo

import gradio as gr

from access.roles import LOCAL_ADMIN, Role, Visitor
from inference.registry import MODELS
from inference.types import Request
from recipes import load_photo, shrink
from storage.reward_functions import StoreError
from training.data.bundled import bundled_photos
from training.runs.adapters import model_name, run_title
from training.runs.run import RunError, is_run_id
from ui.events import PRIVATE, UNQUEUED, UNQUEUED_EACH, UNQUEUED_LATEST, tab_selected
from ui.messages import user_error
from ui.permissions import visitor_of
from ui.services import AppServices, SharedComponents
from ui.usage.view import ModelLabel, alerts_snapshot, dashboard_snapshot, dashboard_view, machine_snapshot, time_field
from usage.alerts import Alert, AlertError
from usage.analytics import FilterOptions
from usage.budgets import Budget, BudgetError
from usage.cache import CacheBuildingError
from usage.machine import MachinePriceError
from usage.time_window import CUSTOM, PERIODS, FilterError, UsageFilter, Window, time_zones

TAB = "Usage"
GROUPINGS = ("branch", "model")
RECENT_CALLS = 50
REFRESH_SECONDS = 5.0  # while the tab is open
MAX_NAMES = 50  # per filter
SAMPLE_SKILLS = ("recipe", "caption", "query", "detect")  # of the sample traffic; two photos each
SAMPLE_PROMPTS = {"query": "What is the main colour?", "detect": "the main subject"}
ADMINS_SEE_USAGE = (
    "Usage, costs and budgets are for administrators of this deployment. Sign in as one to see them; every model call "
    "is recorded with its latency, tokens and cost, but without photo, prompt or answer."
)
LINK_PREFIX = "usage."  # of the filters' names in the page's URL


@dataclass(frozen=True)
class DashboardFilter:
    """Values of the filter inputs.

    Attributes:
        period: A name in PERIODS, or "custom" with `start` and `end`.
        branches: Names of branches; empty for all. Likewise `models`, `skills` and `outcomes`.
        by: A name in GROUPINGS: what the charts have one line for each of.
        zone: IANA name of a time zone.
        start: Local time in `zone`, in ISO 8601; likewise `end`.
    """

    period: str = "day"
    branches: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    skills: tuple[str, ...] = ()
    outcomes: tuple[str, ...] = ()
    by: str = "branch"
    zone: str = "UTC"
    start: str | None = None
    end: str | None = None

    @classmethod
    def from_inputs(cls, values: Mapping[str, Any]) -> DashboardFilter:
        """Create a filter from the inputs' values by name; unknown groupings and time zones become the default."""
        names = {name: tuple(str(item) for item in (values[name] or [])[:MAX_NAMES]) for name in NAME_FIELDS}
        return cls(
            period=str(values["period"]),
            by=_valid_grouping(values["by"]),
            zone=_valid_zone(values["zone"]),
            start=values["start"] or None,
            end=values["end"] or None,
            **names,
        )

    def to_query(self) -> UsageFilter:
        """Return the filter for the queries in `usage.analytics`. Raises FilterError."""
        custom = self.period == CUSTOM
        start, end = (_parse_time(text) if custom else None for text in (self.start, self.end))
        return UsageFilter(self.period, self.branches, self.models, self.skills, self.outcomes, self.zone, start, end)


@dataclass(frozen=True)
class ShownUsage:
    """What a page shows.

    Attributes:
        options: The choices of the filters.
        window: The period of the dashboard.
    """

    options: FilterOptions
    window: Window


FIELDS = tuple(DashboardFilter.__dataclass_fields__)
NAME_FIELDS = ("branches", "models", "skills", "outcomes")
DATE_FIELDS = ("start", "end")
PERIOD_FIELDS = ("period", *DATE_FIELDS)
OPTION_FIELDS = ("branches", "models", "skills")  # whose choices come from the database
UPDATED_FIELDS = (*OPTION_FIELDS, *DATE_FIELDS)  # that a refresh may update


def _parse_time(text: str | None) -> datetime | None:
    try:
        return datetime.fromisoformat(str(text)[:40]) if text else None
    except ValueError:
        raise FilterError("Enter a time like 2026-11-23 18:00.") from None


def _valid_zone(zone: Any) -> str:
    return zone if zone in time_zones() else "UTC"


def _valid_grouping(by: Any) -> str:
    return by if by in GROUPINGS else GROUPINGS[0]


def _local_text(time: datetime, zone: str) -> str:
    """Return a time as the value of a time field, to the second."""
    return time.astimezone(ZoneInfo(zone)).replace(tzinfo=None).isoformat(timespec="seconds")


# ── Handlers ────────────────────────────────────────────────────────────────────────────────────────────────────────


def refresh(
    services: AppServices, shown: ShownUsage | None, inputs: Mapping[str, Any], visitor: Visitor = LOCAL_ADMIN
) -> tuple[Any, ...]:
    """Query the dashboard. A custom period without dates becomes the period that is shown, as a start to change it.

    Args:
        services: The application's services.
        shown: What the page shows now; None if it shows no dashboard yet.
        inputs: Values of the filter inputs by name.
        visitor: The sender of the request. Only administrators see usage.

    Returns:
        The dashboard's snapshot or an error; updates of UPDATED_FIELDS; and what the page shows then.
    """
    unchanged = [gr.skip()] * len(UPDATED_FIELDS)
    if visitor.role < Role.ADMIN:
        return {"error": ADMINS_SEE_USAGE, "notice": True}, *unchanged, shown
    filters = DashboardFilter.from_inputs(inputs)
    choices, dates = [gr.skip()] * len(OPTION_FIELDS), [gr.skip()] * len(DATE_FIELDS)
    try:
        if filters.period == CUSTOM and not filters.start and not filters.end:
            window = shown.window if shown else UsageFilter().window(datetime.now(timezone.utc))
            dates = [_local_text(time, filters.zone) for time in (window.start, window.end)]
            filters = replace(filters, start=dates[0], end=dates[1])
        options = services.usage.options()
        query = filters.to_query()
        usage = services.usage.dashboard(query, filters.by)
        snapshot = dashboard_snapshot(
            usage,
            services.usage.recent(query, RECENT_CALLS),
            services.budgets.list(),
            filters.zone,
            filters.by,
            partial(model_label, services),
        )
        snapshot["machine"] = machine_snapshot(services.meter.machine)
        snapshot["alerts"] = alerts_snapshot(services.alerts.list(), services.alerts.webhook is not None, filters.zone)
        snapshot["filter"] = {name: getattr(filters, name) for name in PERIOD_FIELDS}
    except CacheBuildingError as error:
        return {"error": str(error), "notice": True}, *unchanged, shown
    except (StoreError, FilterError) as error:
        return {"error": str(error)}, *unchanged, shown
    if not shown or options != shown.options:
        titles = {"models": [(model_label(services, name).title, name) for name in options.models]}
        choices = [gr.update(choices=titles.get(name, list(getattr(options, name)))) for name in OPTION_FIELDS]
    return snapshot, *choices, *dates, ShownUsage(options, usage.metrics.window)


def model_label(services: AppServices, name: str) -> ModelLabel:
    """Return how to display a model or an adapter in usage events: models by their titles, runs by their names."""
    run_id = name.removeprefix(model_name(""))
    if is_run_id(run_id):
        with suppress(RunError):
            return ModelLabel(run_title(services.runs.get(run_id)), run_id)
        return ModelLabel(f"Deleted run {run_id}")
    return ModelLabel(MODELS[name].title if name in MODELS else name)


def refresh_if_open(
    services: AppServices,
    tab_open: bool,
    shown: ShownUsage | None,
    inputs: Mapping[str, Any],
    visitor: Visitor = LOCAL_ADMIN,
) -> tuple[Any, ...]:
    """Refresh the dashboard if the tab is open."""
    return refresh(services, shown, inputs, visitor) if tab_open else (gr.skip(),) * (len(UPDATED_FIELDS) + 2)


def filters_from_link(request: gr.Request, zone: str) -> dict[str, Any]:
    """Read the filters from the page's URL.

    Args:
        request: The request for the page.
        zone: The browser's time zone.

    Returns:
        Values of the filters, of "tabs" and of "tab_open" by name. For a URL without filters only the time zone.
    """
    linked = {name: request.query_params.getlist(LINK_PREFIX + name) for name in FIELDS}
    if not any(linked.values()):
        return {"zone": _valid_zone(zone)}
    values: dict[str, Any] = {}
    for name, items in linked.items():
        if name in NAME_FIELDS:
            values[name] = items[:MAX_NAMES]
        else:
            values[name] = items[-1] if items else None
    if values["period"] not in (*PERIODS, CUSTOM):
        values["period"] = DashboardFilter.period
    values["by"] = _valid_grouping(values["by"])
    values["zone"] = _valid_zone(zone if values["zone"] is None else values["zone"])
    return values | {"tabs": gr.Tabs(selected=TAB), "tab_open": True}


def period_changed(period: str) -> dict[str, Any]:
    """Show the inputs for a custom period."""
    return gr.update(visible=period == CUSTOM)


def period_selected(event: gr.EventData, zone: str) -> tuple[str, Any, Any]:
    """Return the values of the period's inputs for a time span selected in a chart, or for an earlier period.

    Args:
        event: {start, end} in seconds since 1970, or values of PERIOD_FIELDS.
        zone: The time zone of the inputs.

    Raises:
        gr.Error: The data are invalid.
    """
    data = event._data if isinstance(event._data, dict) else {}
    try:
        if "period" not in data:
            zone = _valid_zone(zone)
            start, end = (datetime.fromtimestamp(float(data[name]), timezone.utc) for name in DATE_FIELDS)
            return CUSTOM, _local_text(start, zone), _local_text(end, zone)
        if data["period"] == CUSTOM:
            start, end = (_parse_time(data[name]) for name in DATE_FIELDS)
            if start and end:
                return CUSTOM, start.isoformat(timespec="seconds"), end.isoformat(timespec="seconds")
        elif data["period"] in PERIODS:
            return data["period"], gr.skip(), gr.skip()  # the dates are hidden
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        pass
    raise user_error("This period cannot be shown. Choose another one.", "Period")


def update_budget(services: AppServices, event: gr.EventData) -> None:
    """Set or remove a budget. Raises gr.Error if the form is invalid."""
    data = event._data if isinstance(event._data, dict) else {}
    branch = str(data.get("branch") or "").strip()
    try:
        if data.get("action") == "remove":
            services.budgets.remove(branch)
        else:
            services.budgets.set(Budget(branch, float(data.get("limit") or 0), bool(data.get("stop"))))
    except (BudgetError, StoreError) as error:
        raise user_error(str(error), "Budget") from None
    except (TypeError, ValueError, OverflowError):
        raise user_error("Enter the budget as a number of US dollars.", "Budget") from None


def update_alert(services: AppServices, event: gr.EventData) -> None:
    """Set or remove a limit. Raises gr.Error if the form is invalid."""
    data = event._data if isinstance(event._data, dict) else {}
    branch, measure = str(data.get("branch") or "").strip(), str(data.get("measure") or "")
    try:
        if data.get("action") == "remove":
            services.alerts.remove(branch, measure)
        else:
            scale = 100 if measure == "error_rate" else 1
            services.alerts.set(Alert(branch, measure, float(data.get("limit") or 0) / scale))  # type: ignore[arg-type]
            services.alerts.check()
    except (AlertError, StoreError) as error:
        raise user_error(str(error), "Alert") from None
    except (TypeError, ValueError, OverflowError):
        raise user_error("Enter the limit as a number.", "Alert") from None


def update_machine_price(services: AppServices, event: gr.EventData) -> str:
    """Set what this machine costs an hour, and price past calls if wanted. Return a message.

    Raises gr.Error if the form is invalid.
    """
    data, machine = event._data if isinstance(event._data, dict) else {}, services.meter.machine
    if machine is None:
        raise user_error("This deployment records no cost of its machine.", "Machine")
    try:
        machine.set(None if data.get("action") == "remove" else float(data.get("dollars", "")))
        if not data.get("past") or machine.per_hour is None:
            return "The price counts from now on."
        count = machine.price_past_events(services.meter.recorder.deployment.space, partial(_is_local, services))
    except (MachinePriceError, StoreError) as error:
        raise user_error(str(error), "Machine") from None
    except (TypeError, ValueError, OverflowError):
        raise user_error("Enter the price as a number of US dollars per hour.", "Machine") from None
    return f"The price counts from now on, and for {count:,} past calls."


def _is_local(services: AppServices, model: str, adapter: str) -> bool:
    """Whether calls of a model, or the training of an adapter, ran on this machine."""
    if is_run_id(adapter):
        with suppress(RunError):
            return services.runs.get(adapter).config().backend == "here"
        return False
    return adapter != "" or (model in MODELS and MODELS[model].backend != "hosted")


def generate_sample_traffic(services: AppServices) -> Iterator[None]:
    """Let the built-in model answer two bundled photos per skill; the calls are recorded like any other."""
    photos = [shrink(load_photo(info.path)) for info in bundled_photos("held-out")[:2]]
    for skill in SAMPLE_SKILLS:
        for seed, photo in enumerate(photos):
            prompt = SAMPLE_PROMPTS.get(skill, "")
            request = Request(photo, skill, prompt, n=2 if skill == "recipe" else 1, seed=seed)
            for _ in services.meter.compare(["moondream-tiny"], request, Event(), "demonstration"):
                pass
    with suppress(StoreError, OSError):  # the recorder retries, and the next refresh shows a lasting error
        services.meter.recorder.flush()
    yield None


# ── Layout ──────────────────────────────────────────────────────────────────────────────────────────────────────────

ZONE_JS = "() => [Intl.DateTimeFormat().resolvedOptions().timeZone]"
# Keeps the filters in the page's URL while the tab is open, and removes them when it is not.
LINK_JS = """(...values) => {
  const tab = document.querySelector('[role=tab][aria-selected=true]');
  const tabOpen = tab && tab.textContent.trim() === $TAB;
  const query = new URLSearchParams(location.search);
  [...query.keys()].filter(name => name.startsWith($PREFIX)).forEach(name => query.delete(name));
  if (tabOpen) $FIELDS.forEach((name, index) => {
    [values[index]].flat().filter(value => (value ?? '') !== '').forEach(value => query.append($PREFIX + name, value));
  });
  const search = query.toString();
  if (search !== new URLSearchParams(location.search).toString()) {
    history.replaceState(history.state, '', location.pathname + (search ? '?' + search : ''));
  }
  return [];
}"""
# Downloads the filtered events from GET /v1/usage.csv or /v1/usage.parquet.
EXPORT_JS = """(...values) => {
  const query = new URLSearchParams();
  const filters = Object.fromEntries($FIELDS.map((name, index) => [name, values[index]]));
  const parameters = {branches: 'branch', models: 'model', skills: 'skill', outcomes: 'outcome'};
  query.set('period', filters.period);
  query.set('zone', filters.zone);
  for (const [name, parameter] of Object.entries(parameters)) {
    for (const value of filters[name] || []) query.append(parameter, value);
  }
  if (filters.period === 'custom') {
    for (const name of ['start', 'end']) if (filters[name]) query.set(name, filters[name]);
  }
  const link = document.createElement('a');
  link.href = 'v1/usage.' + $FORMAT + '?' + query;
  link.download = '';
  document.body.append(link); link.click(); link.remove();
  return [];
}"""


def fill_in(code: str, **values: Any) -> str:
    """Replace $NAMES in JavaScript by values as JSON."""
    return Template(code).substitute({name: json.dumps(value) for name, value in values.items()})


def build(services: AppServices, shared_components: SharedComponents) -> None:
    """Build the tab: filters, dashboard and downloads."""
    tab_open, shown = gr.State(False), gr.State(None)
    timer = gr.Timer(REFRESH_SECONDS)
    filters: dict[str, Any] = {}
    names: dict[str, Any] = {
        "multiselect": True,
        "allow_custom_value": True,
        "max_choices": MAX_NAMES,
        "min_width": 150,
        "info": "Empty: all",
    }
    with gr.Row(elem_id="usage-filters"):
        filters["period"] = gr.Radio(
            [*PERIODS, CUSTOM], value=DashboardFilter.period, label="Period", min_width=300, elem_id="usage-period"
        )
        filters["by"] = gr.Radio(list(GROUPINGS), value=GROUPINGS[0], label="Group by", min_width=140)
    with gr.Row(elem_id="usage-names"):
        filters["branches"] = gr.Dropdown([], value=[], label="Branches", **names)
        filters["models"] = gr.Dropdown([], value=[], label="Models", **names)
        filters["skills"] = gr.Dropdown([], value=[], label="Skills", **names)
        filters["outcomes"] = gr.Dropdown(list(FilterOptions.outcomes), value=[], label="Outcomes", **names)
    with gr.Row(visible=False, elem_id="usage-custom") as custom_period:
        filters["start"], filters["end"] = time_field("From"), time_field("To")
        filters["zone"] = gr.Dropdown(sorted(time_zones()), value="UTC", label="Time zone", min_width=160)
    dashboard = dashboard_view()
    with gr.Row(elem_id="usage-downloads"):
        downloads = {
            "csv": gr.Button("Download CSV", size="sm", min_width=140),
            "parquet": gr.Button("Download Parquet", size="sm", min_width=140),
        }

    # Refreshing
    refresh_inputs = {tab_open, shown, *filters.values()}
    refresh_outputs = [dashboard, *(filters[name] for name in UPDATED_FIELDS), shown]

    def refreshed_if_open(values: dict[Any, Any], request: gr.Request) -> tuple[Any, ...]:
        inputs = {name: values[filters[name]] for name in FIELDS}
        visitor = visitor_of(services.access, request)
        return refresh_if_open(services, values[tab_open], values[shown], inputs, visitor)

    filter_list = [filters[name] for name in FIELDS]  # in the order that the JavaScript expects
    link_js = fill_in(LINK_JS, FIELDS=FIELDS, PREFIX=LINK_PREFIX, TAB=TAB)
    linked_components = {**filters, "tabs": shared_components.tabs, "tab_open": tab_open, **downloads}

    def link_opened(request: gr.Request, zone: str) -> dict[Any, Any]:
        values = filters_from_link(request, zone)
        if visitor_of(services.access, request).role < Role.ADMIN:
            values |= {name: gr.update(interactive=False) for name in downloads}
        return {linked_components[name]: value for name, value in values.items()}

    loaded = shared_components.page.load(
        link_opened, filters["zone"], list(linked_components.values()), js=ZONE_JS, **UNQUEUED
    )
    loaded.then(refreshed_if_open, refresh_inputs, refresh_outputs, **UNQUEUED)
    opened = shared_components.tabs.select(tab_selected(TAB), None, tab_open, **UNQUEUED_EACH)
    opened.then(refreshed_if_open, refresh_inputs, refresh_outputs, **UNQUEUED)
    opened.then(None, filter_list, None, js=link_js, **PRIVATE)

    # Filters
    filters["period"].input(period_changed, filters["period"], custom_period, **UNQUEUED)
    filters["period"].change(period_changed, filters["period"], custom_period, **UNQUEUED)
    changes = [filters[name].input for name in FIELDS]
    # One event, so that a slow refresh of the timer does not arrive after that of a filter that was changed meanwhile.
    changed = gr.on([timer.tick, *changes], refreshed_if_open, refresh_inputs, refresh_outputs, **UNQUEUED_LATEST)
    changed.then(None, filter_list, None, js=link_js, **PRIVATE)  # also the dates that the refresh fills in

    period_inputs = [filters[name] for name in PERIOD_FIELDS]
    zoomed = dashboard.zoom(period_selected, filters["zone"], period_inputs, **UNQUEUED)
    zoomed.then(refreshed_if_open, refresh_inputs, refresh_outputs, **UNQUEUED)
    zoomed.then(None, filter_list, None, js=link_js, **PRIVATE)

    # Actions
    def budget_submitted(event: gr.EventData) -> None:
        update_budget(services, event)

    budget_updated = dashboard.budget(budget_submitted, None, None, **PRIVATE)
    budget_updated.then(refreshed_if_open, refresh_inputs, refresh_outputs, **UNQUEUED)

    def alert_submitted(event: gr.EventData) -> None:
        update_alert(services, event)

    alert_updated = dashboard.alert(alert_submitted, None, None, **PRIVATE)
    alert_updated.then(refreshed_if_open, refresh_inputs, refresh_outputs, **UNQUEUED)

    def machine_price_submitted(event: gr.EventData) -> None:
        gr.Info(update_machine_price(services, event), title="Machine")

    priced = dashboard.machine(machine_price_submitted, None, None, **PRIVATE)
    priced.then(refreshed_if_open, refresh_inputs, refresh_outputs, **UNQUEUED)
    generated = dashboard.generate(
        partial(generate_sample_traffic, services), None, None, concurrency_limit=1, **PRIVATE
    )
    generated.then(refreshed_if_open, refresh_inputs, refresh_outputs, **UNQUEUED)
    for file_format, button in downloads.items():
        button.click(None, filter_list, None, js=fill_in(EXPORT_JS, FIELDS=FIELDS, FORMAT=file_format), **PRIVATE)
