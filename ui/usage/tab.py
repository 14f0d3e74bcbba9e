"""The Usage tab: what the calls were, how long they took and what they cost, per branch, model, skill and outcome."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from string import Template
from threading import Event
from typing import Any
from zoneinfo import available_timezones

import gradio as gr

from inference.types import Request
from recipes import load_photo, shrink
from storage.reward_functions import StoreError
from training.data.bundled import bundled
from ui.messages import refusal
from ui.services import AppServices, SharedComponents
from ui.usage.view import dashboard_value, dashboard_view
from usage.analytics import Options
from usage.budgets import Budget, BudgetError
from usage.time_window import CUSTOM, PERIODS, Filter, FilterError

TAB = "Usage"
BY = ("branch", "model")
RECENT = 50
EVERY = 5.0  # seconds between two looks while the tab is open
MANY = 50  # names of a kind that a filter takes
DEMONSTRATION = ("recipe", "caption", "query", "detect")  # skills; each is asked of two photos
LINK = "usage."  # how the names of the filters begin in the address


@dataclass(frozen=True)
class DashboardFilter:
    """The filters as the page has them; start and end are on the wall's clock in the zone."""

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
    def of(cls, values: Sequence[Any]) -> DashboardFilter:
        """From the components' values in the order of the fields."""
        period, branches, models, skills, outcomes, by, zone, start, end = values
        return cls(
            str(period),
            *(tuple(str(name) for name in (some or [])[:MANY]) for some in (branches, models, skills, outcomes)),
            by=by if by in BY else BY[0],
            zone=zone if zone in available_timezones() else "UTC",
            start=start or None,
            end=end or None,
        )

    def filter(self) -> Filter:
        """As the queries take it. Raises FilterError."""
        custom = self.period == CUSTOM
        times = [_moment(text) if custom else None for text in (self.start, self.end)]
        return Filter(self.period, self.branches, self.models, self.skills, self.outcomes, self.zone, *times)


FIELDS = tuple(DashboardFilter.__dataclass_fields__)
LISTS = ("branches", "models", "skills", "outcomes")


def _moment(text: str | None) -> datetime | None:
    try:
        return datetime.fromisoformat(str(text)[:40]) if text else None
    except ValueError:
        raise FilterError("Write a time like 2026-11-23 18:00.") from None


# ── Handlers ────────────────────────────────────────────────────────────────────────────────────────────────────────


def look(services: AppServices, seen: Options | None, *values: Any) -> tuple[Any, ...]:
    """The view, choices for branches, models and skills where there are new ones, and what there is to choose from."""
    chosen = DashboardFilter.of(values)
    try:
        options = services.usage.options()
        view = _value(services, chosen)
    except (StoreError, FilterError) as error:
        return {"error": str(error)}, *[gr.skip()] * 3, seen
    if options == seen:
        return view, *[gr.skip()] * 3, seen
    return view, *(gr.update(choices=list(getattr(options, name))) for name in LISTS[:3]), options


def _value(services: AppServices, chosen: DashboardFilter) -> dict[str, Any]:
    wanted = chosen.filter()
    shown, recent = services.usage.dashboard(wanted, chosen.by), services.usage.recent(wanted, RECENT)
    here = services.meter.recorder.deployment.branch
    return dashboard_value(shown, recent, services.budgets.list(), chosen.zone, chosen.by, here)


def looked(services: AppServices, here: bool, seen: Options | None, *values: Any) -> tuple[Any, ...]:
    """As `look`, but only where the tab is open."""
    return look(services, seen, *values) if here else (gr.skip(),) * 5


def from_link(request: gr.Request, zone: str) -> tuple[Any, ...]:
    """The filters of the page's address, the tab that it opens, and whether that is this one."""
    query = request.query_params
    linked = {name: query.getlist(LINK + name) for name in FIELDS}
    if not any(linked.values()):
        return *(gr.skip() if name != "zone" else _known(zone) for name in FIELDS), gr.skip(), gr.skip()
    values: dict[str, Any] = {name: some[:MANY] if name in LISTS else some[-1] for name, some in linked.items() if some}
    values["period"] = values["period"] if values.get("period") in (*PERIODS, CUSTOM) else DashboardFilter.period
    values["by"] = values["by"] if values.get("by") in BY else BY[0]
    values["zone"] = _known(values.get("zone", zone))
    return *(values.get(name, [] if name in LISTS else None) for name in FIELDS), gr.Tabs(selected=TAB), True


def _known(zone: str) -> str:
    return zone if zone in available_timezones() else "UTC"


def period_chosen(period: str) -> dict[str, Any]:
    """The inputs for a custom period, where one is wanted."""
    return gr.update(visible=period == CUSTOM)


def tab_opened(event: gr.SelectData) -> bool:
    """Whether it was this tab."""
    return event.value == TAB


def budget(services: AppServices, event: gr.EventData) -> None:
    """Sets or removes a budget, as the form says; gr.Error says what to mend."""
    asked = event._data if isinstance(event._data, dict) else {}
    branch = str(asked.get("branch") or "").strip()
    try:
        if asked.get("do") == "remove":
            services.budgets.remove(branch)
        else:
            services.budgets.set(Budget(branch, float(asked.get("limit") or 0), bool(asked.get("stop"))))
    except (BudgetError, StoreError) as error:
        raise refusal(str(error), "Budget") from None
    except (TypeError, ValueError, OverflowError):
        raise refusal("A budget is a number of US dollars.", "Budget") from None


def demonstrate(services: AppServices) -> Iterator[None]:
    """Lets the embedded model answer a few bundled photos; each call is recorded as any other."""
    photos = [shrink(load_photo(info.path)) for info in bundled("held-out")[:2]]
    for skill in DEMONSTRATION:
        for seed, photo in enumerate(photos):
            prompt = {"query": "What is the main colour?", "detect": "the main subject"}.get(skill, "")
            request = Request(photo, skill, prompt, n=2 if skill == "recipe" else 1, seed=seed)
            for _ in services.meter.compare(["moondream-tiny"], request, Event(), "demonstration"):
                pass
    with suppress(StoreError, OSError):  # what was recorded waits and comes later; the next look says what is wrong
        services.meter.recorder.flush()
    yield None


# ── Layout ──────────────────────────────────────────────────────────────────────────────────────────────────────────

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
QUICK: dict[str, Any] = {"queue": False, **PRIVATE}
ZONE_JS = "() => [Intl.DateTimeFormat().resolvedOptions().timeZone]"
# The address carries the filters while the tab is open, and only then.
LINK_JS = """(...values) => {
  const tab = document.querySelector('[role=tab][aria-selected=true]'), here = tab && tab.textContent.trim() === $TAB;
  const query = new URLSearchParams(location.search);
  [...query.keys()].filter(name => name.startsWith($LINK)).forEach(name => query.delete(name));
  if (here) $FIELDS.forEach((name, place) => {
    [values[place]].flat().filter(value => (value ?? '') !== '').forEach(value => query.append($LINK + name, value));
  });
  const words = query.toString();
  history.replaceState(history.state, '', location.pathname + (words ? '?' + words : ''));
  return [];
}"""
# The same filters as the address of a file with all events.
EXPORT_JS = """(...values) => {
  const query = new URLSearchParams(), asked = Object.fromEntries($FIELDS.map((name, place) => [name, values[place]]));
  const names = {branches: 'branch', models: 'model', skills: 'skill', outcomes: 'outcome'};
  query.set('period', asked.period);
  query.set('zone', asked.zone);
  for (const [name, one] of Object.entries(names)) for (const value of asked[name] || []) query.append(one, value);
  if (asked.period === 'custom') for (const name of ['start', 'end']) if (asked[name]) query.set(name, asked[name]);
  const link = document.createElement('a');
  link.href = 'v1/usage.' + $KIND + '?' + query;
  link.download = '';
  document.body.append(link); link.click(); link.remove();
  return [];
}"""


def script(code: str, **values: Any) -> str:
    """The code with its $NAMES replaced by values."""
    return Template(code).substitute({name: json.dumps(value) for name, value in values.items()})


def build(services: AppServices, shared_components: SharedComponents) -> None:
    """The tab: filters, the view, downloads."""
    here, seen = gr.State(False), gr.State(None)
    timer = gr.Timer(EVERY)
    filters, custom = _filters()
    view = dashboard_view()
    with gr.Row(elem_id="usage-files"):
        files = {kind: gr.Button(f"Download as {kind}", size="sm", min_width=140) for kind in ("csv", "parquet")}
    chosen = [filters[name] for name in FIELDS]
    shown = [view, *(filters[name] for name in LISTS[:3]), seen]
    anew = partial(look, services)
    to_link = script(LINK_JS, FIELDS=FIELDS, LINK=LINK, TAB=TAB)

    def asked_budget(event: gr.EventData) -> None:
        budget(services, event)

    linked = gr.on(None, from_link, filters["zone"], [*chosen, shared_components.tabs, here], js=ZONE_JS, **QUICK)
    linked.then(partial(looked, services), [here, seen, *chosen], shown, **QUICK)
    opened = shared_components.tabs.select(tab_opened, None, here, **QUICK)
    opened.then(partial(looked, services), [here, seen, *chosen], shown, **QUICK)
    opened.then(None, chosen, None, js=to_link, **PRIVATE)
    timer.tick(partial(looked, services), [here, seen, *chosen], shown, **QUICK)
    filters["period"].input(period_chosen, filters["period"], custom, **QUICK)
    filters["period"].change(period_chosen, filters["period"], custom, **QUICK)
    changed = [component.input for component in chosen if not isinstance(component, gr.DateTime)]
    changed += [filters[name].change for name in ("start", "end")]
    gr.on(changed, anew, [seen, *chosen], shown, **QUICK)
    gr.on(changed, None, chosen, None, js=to_link, **PRIVATE)
    view.budget(asked_budget, None, None, **PRIVATE).then(anew, [seen, *chosen], shown, **QUICK)
    load = view.demonstrate(partial(demonstrate, services), None, None, concurrency_limit=1, **PRIVATE)
    load.then(anew, [seen, *chosen], shown, **QUICK)
    for kind, button in files.items():
        button.click(None, chosen, None, js=script(EXPORT_JS, FIELDS=FIELDS, KIND=kind.lower()), **PRIVATE)


def _filters() -> tuple[dict[str, Any], gr.Row]:
    """The filters by their names, and the row that is shown for a custom period only."""
    many: dict[str, Any] = {"multiselect": True, "allow_custom_value": True, "max_choices": MANY, "min_width": 150}
    with gr.Row(elem_id="usage-filters"):
        period = gr.Radio(
            [*PERIODS, CUSTOM], value=DashboardFilter.period, label="Period", min_width=300, elem_id="usage-period"
        )
        by = gr.Radio(list(BY), value=BY[0], label="A line per", min_width=140)
    with gr.Row(elem_id="usage-names"):
        branches = gr.Dropdown([], value=[], label="Branches", info="None chosen means all", **many)
        models = gr.Dropdown([], value=[], label="Models", info="None chosen means all", **many)
        skills = gr.Dropdown([], value=[], label="Skills", info="None chosen means all", **many)
        outcomes = gr.Dropdown(list(Options.outcomes), value=[], label="Outcomes", info="None chosen means all", **many)
    with gr.Row(visible=False, elem_id="usage-custom") as custom:
        start = gr.DateTime(label="From", type="string", min_width=160)
        end = gr.DateTime(label="To", type="string", min_width=160)
        zone = gr.Dropdown(sorted(available_timezones()), value="UTC", label="Time zone", min_width=160)
    parts = (period, branches, models, skills, outcomes, by, zone, start, end)
    return dict(zip(FIELDS, parts, strict=True)), custom
