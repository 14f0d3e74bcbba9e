"""Dashboard of the Usage tab: one gr.HTML component whose value is a JSON snapshot, drawn by dashboard.js.

Numbers are formatted here, with their units, so that charts and tables agree. The template contains no placeholders:
names of branches and models reach the page only as `textContent`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import gradio as gr

from ui.components import template_component
from usage.alerts import PERIODS, Alert
from usage.analytics import BranchSummary, Dashboard, Metric, Metrics, ModelCost, ScatterPoint, Series, SeriesLine
from usage.budgets import BudgetStatus
from usage.events import UsageEvent
from usage.machine import MachinePrice

HERE = Path(__file__).resolve().parent
MAX_BRANCHES = 20  # in the table of branches
MAX_LINES = 8  # per chart; smaller lines are added up to one
MAX_NAME_LENGTH = 120  # displayed characters of a name
METRICS = {
    "calls": "Calls",
    "error_rate": "Error rate",
    "p50": "Latency p50",
    "p95": "Latency p95",
    "p99": "Latency p99",
    "first_token": "Time to first token",
    "queue": "Queue time p95",
    "cold_starts": "Cold starts",
    "tokens": "Tokens",
    "cost": "Cost",
    "cost_per_request": "Cost per request",
    "reward_per_cent": "Reward per cent",
}
BRANCH_COLUMNS = {
    "calls": "Calls",
    "error_rate": "Error rate",
    "cost_per_request": "Cost per request",
    "reward": "Mean reward",
    "reward_per_cent": "Reward per cent",
}
HIGHER_IS_BETTER = ("reward", "reward_per_cent")
LOWER_IS_BETTER = ("error_rate", "p50", "p95", "p99", "first_token", "queue", "cost_per_request")
MIN_CHANGE = 0.0005  # relative difference between branches that is shown
MIN_TREND = 0.01  # relative change from which a value is better or worse
BIN_FORMATS = {"minute": "%H:%M", "hour": "%d %b %H:%M", "6 hours": "%d %b %H:%M", "day": "%d %b", "month": "%b %Y"}
UNKNOWN = "–"


@dataclass(frozen=True)
class ModelLabel:
    """How a model is displayed: its title, and the id of the run that it was tuned in, or ""."""

    title: str
    run: str = ""


def dashboard_view() -> gr.HTML:
    """Create the component.

    It fires `zoom` with {start, end} in seconds since 1970 or with an earlier `filter` of the snapshot, `budget` with
    {action, branch, limit, stop}, `alert` with {action, branch, measure, limit}, `machine` with {action, dollars,
    past}, and `generate`.
    """
    return template_component(HERE, "dashboard", "dashboard")


def time_field(title: str) -> gr.HTML:
    """Create a field for a local time, whose value is text in ISO 8601. It fires `input` when a time is entered."""
    return template_component(HERE, "time_field", label=title, value="", min_width=160)


def dashboard_snapshot(
    dashboard: Dashboard,
    recent: Sequence[UsageEvent],
    budgets: Sequence[BudgetStatus],
    zone: str,
    by: str,
    model_of: Callable[[str], ModelLabel] = ModelLabel,
) -> dict[str, Any]:
    """Return everything that the dashboard shows, as JSON.

    Args:
        dashboard: Metrics and series of the filtered events.
        recent: Latest events, newest first.
        budgets: State of all budgets.
        zone: IANA name of the time zone of all times.
        by: "branch" or "model": what the charts of calls and cost have one line for each of.
        model_of: Returns how a model is displayed.
    """
    metrics, order = dashboard.metrics, _largest_first(dashboard.volume)
    name_of = (lambda name: model_of(name).title) if by == "model" else str
    size = dashboard.volume.bin
    return {
        "empty": not metrics.calls.value,
        "period": _format_period(metrics, zone),
        "has_previous": bool(metrics.calls.previous),
        "metrics": [_metric(name, getattr(metrics, name), bool(metrics.calls.previous)) for name in METRICS],
        "notes": _notes(metrics),
        **_branch_comparison(dashboard.branches),
        "zone": zone,
        "bins": [start.timestamp() for start in dashboard.volume.starts],
        "bin_texts": [_format_bin(start, dashboard.volume.bin) for start in dashboard.volume.starts],
        "end": metrics.window.end.timestamp(),
        "charts": [
            _chart(
                "Calls", f"per {size}, by {by}", f"calls per {size}", _limit_lines(dashboard.volume, order), name_of
            ),
            _chart("Latency", f"percentiles per {size}", "latency", dashboard.latency),
            _chart(
                "Cost", f"per {size}, by {by}", f"US dollars per {size}", _limit_lines(dashboard.cost, order), name_of
            ),
        ],
        "scatter": [_scatter_point(dot, model_of(dot.model).title) for dot in dashboard.scatter],
        "cost_per_model": [
            bar | {"run": model_of(model.name).run}
            for model, bar in zip(
                dashboard.cost_per_model,
                _bars([(model_of(m.name).title, m.cost, _format_cost(m)) for m in dashboard.cost_per_model]),
                strict=True,
            )
        ],
        "errors": _bars(
            [(error.name or "unclassified", error.calls, f"{error.calls:,}") for error in dashboard.errors]
        ),
        "recent": [_recent_row(event, zone, model_of) for event in recent],
        "recent_runs": [model_of(event.adapter).run if event.adapter else "" for event in recent],
        "budgets": [_budget(status) for status in budgets],
    }


def alerts_snapshot(alerts: Sequence[Alert], has_webhook: bool, zone: str) -> dict[str, Any]:
    """Return what the section of alerts shows, as JSON."""
    receiver = "" if has_webhook else " Set ALERT_WEBHOOK_URL to have them sent."
    return {
        "text": f"An alert appears here when a limit is exceeded, and is sent as one webhook.{receiver}",
        "alerts": [
            {
                "branch": alert.branch,
                "measure": alert.measure,
                "name": _shorten(alert.branch) or "All branches",
                "text": _alert_text(alert, has_webhook, zone),
                "exceeded": alert.since is not None,
            }
            for alert in alerts
        ],
    }


def _alert_text(alert: Alert, has_webhook: bool, zone: str) -> str:
    """Describe a limit and its state."""
    title = {"error_rate": "error rate", "p95": "latency p95", "cost": "spend"}[alert.measure]
    limit, value = (format_value(alert.measure, number) for number in (alert.limit, alert.value))
    text = f"{title} of the last {PERIODS[alert.measure]}: limit {limit}, last {value}"
    if alert.since is None:
        return text
    since = alert.since.astimezone(ZoneInfo(zone)).strftime("%d %b %H:%M")
    sent = ("; the webhook was accepted" if alert.sent else "; the webhook is being sent") if has_webhook else ""
    return f"{text} · exceeded since {since}{sent}"


def machine_snapshot(machine: MachinePrice | None) -> dict[str, Any] | None:
    """Return what the form for the machine's price shows, as JSON."""
    if machine is None:
        return None
    dollars, is_set = machine.per_hour, machine.is_set
    source = "set here" if is_set else "from the table of prices"
    text = "Not known: calls of local models have no cost."
    if dollars is not None:
        text = f"{format_money(dollars)} an hour, {source}. Costs of local models are estimated by their time."
    suggestions = [
        {"text": f"{format_money(suggestion.dollars)}: {suggestion.title}", "dollars": suggestion.dollars}
        for suggestion in machine.suggestions()
    ]
    return {"text": text, "is_set": is_set, "suggestions": suggestions}


# ── Formatting ──────────────────────────────────────────────────────────────────────────────────────────────────────


def format_value(measure: str, value: float | None) -> str:
    """Format a value of a measure in METRICS, or of "latency", with its unit."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return _FORMATTERS[measure](value)


def format_money(dollars: float) -> str:
    """Format US dollars with at least two decimals and three significant digits."""
    if dollars == 0:
        return "$0"
    decimals = max(2, 2 - math.floor(math.log10(abs(dollars))))
    return f"${dollars:,.{min(decimals, 12)}f}"


def format_seconds(seconds: float) -> str:
    """Format a duration in seconds with three significant digits; below one second in milliseconds."""
    return f"{_three_digits(seconds * 1000)} ms" if seconds < 1 else f"{_three_digits(seconds)} s"


def _three_digits(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:,.{max(0, min(6, 2 - math.floor(math.log10(abs(value)))))}f}"


_FORMATTERS: dict[str, Callable[[float], str]] = {
    **dict.fromkeys(("calls", "cold_starts", "tokens"), lambda value: f"{value:,.0f}"),
    **dict.fromkeys(("latency", "p50", "p95", "p99", "first_token", "queue"), format_seconds),
    **dict.fromkeys(("cost", "cost_per_request"), format_money),
    "error_rate": lambda value: f"{100 * value:.{0 if value in (0, 1) else 2}f} %",
    "reward": lambda value: f"{value:.3f}",
    "reward_per_cent": _three_digits,
}


def _shorten(name: str) -> str:
    return name if len(name) <= MAX_NAME_LENGTH else name[: MAX_NAME_LENGTH - 1] + "…"


# ── Parts of the snapshot ───────────────────────────────────────────────────────────────────────────────────────────


def _metric(name: str, metric: Metric, has_previous: bool) -> dict[str, Any]:
    """Return a metric with its change; `previous` is "" if the previous period has no calls, or none with a value."""
    change = metric.change
    return {
        "name": METRICS[name],
        "value": format_value(name, metric.value),
        "change": "" if change is None else _format_change(change),
        "previous": format_value(name, metric.previous) if has_previous and metric.previous is not None else "",
        "trend": _trend(name, change),
    }


def _branch_comparison(branches: Sequence[BranchSummary]) -> dict[str, Any]:
    """Return a table of the branches with their change to the reference: "main", or the branch with the most calls."""
    if len(branches) < 2:
        return {"columns": [], "branches": [], "verdict": ""}
    branches = branches[:MAX_BRANCHES]
    reference = next((branch for branch in branches if branch.name == "main"), branches[0])
    others = [branch for branch in branches if branch is not reference]
    rows = [
        {
            "name": _shorten(branch.name),
            "cells": [_branch_cell(name, branch, reference) for name in BRANCH_COLUMNS],
        }
        for branch in (reference, *others)
    ]
    verdict = f"Changes are relative to {_shorten(reference.name)}."
    if len(others) == 1:
        verdict = f"{_branch_verdict(others[0], reference)} {verdict}".strip()
    return {"columns": list(BRANCH_COLUMNS.values()), "branches": rows, "verdict": verdict}


def _branch_cell(name: str, branch: BranchSummary, reference: BranchSummary) -> dict[str, str]:
    value, other = getattr(branch, name), getattr(reference, name)
    text, change = "", None
    if value and other == 0:
        text, change = f"from {format_value(name, other)}", math.inf
    elif value is not None and other:
        change = value / other - 1
        text = _format_change(change) if abs(change) >= MIN_CHANGE else ""
    is_chance = name == "error_rate" and not _rates_differ(branch, reference)
    return {"value": format_value(name, value), "change": text, "trend": "" if is_chance else _trend(name, change)}


def _rates_differ(branch: BranchSummary, reference: BranchSummary) -> bool:
    """Whether two error rates differ by more than two standard errors of their difference."""
    if branch.error_rate is None or reference.error_rate is None:
        return False
    calls = branch.calls + reference.calls
    rate = (branch.calls * branch.error_rate + reference.calls * reference.error_rate) / calls
    error = math.sqrt(rate * (1 - rate) * (1 / branch.calls + 1 / reference.calls))
    return abs(branch.error_rate - reference.error_rate) > 2 * error


def _format_change(change: float) -> str:
    """Format a relative change in per cent; growth to more than tenfold as a factor."""
    if change >= 9:
        return f"× {_three_digits(change + 1)}"
    return f"{100 * change:+z,.1f} %".replace("+0.0 %", "±0.0 %")


def _branch_verdict(branch: BranchSummary, reference: BranchSummary) -> str:
    """Say in one sentence whether a branch is cheaper and better than the reference."""
    parts = []
    for name, less, more in (("cost_per_request", "cheaper", "more expensive"), ("reward", "lower", "higher")):
        value, other = getattr(branch, name), getattr(reference, name)
        if value is None or not other:
            continue
        change = value / other - 1
        subject = "per request" if name == "cost_per_request" else "in reward"
        parts.append(
            f"{100 * abs(change):,.1f} % {less if change < 0 else more} {subject}"
            if abs(change) >= MIN_CHANGE
            else f"equal {subject}"
        )
    return f"{_shorten(branch.name)} is {' and '.join(parts)} than {_shorten(reference.name)}." if parts else ""


def _trend(name: str, change: float | None) -> str:
    """Return whether a relative change of a metric is "better" or "worse"; "" if neither."""
    if change is None or abs(change) < MIN_TREND:
        return ""
    if name in (HIGHER_IS_BETTER if change > 0 else LOWER_IS_BETTER):
        return "better"
    return "worse" if name in (LOWER_IS_BETTER if change > 0 else HIGHER_IS_BETTER) else ""


def _format_period(metrics: Metrics, zone: str) -> str:
    start, end = (moment.astimezone(ZoneInfo(zone)) for moment in (metrics.window.start, metrics.window.end))
    period = f"{start:%d %b %Y %H:%M} to {end:%d %b %Y %H:%M}, {zone}"
    known, missing = "Changes are relative to the previous period.", "No data in the previous period."
    return f"{period}. {known if metrics.calls.previous else missing}"


def _notes(metrics: Metrics) -> list[str]:
    """Return what the metrics leave out, one sentence each."""

    def calls_have(count: int) -> str:
        return f"{count:,} call{' has' if count == 1 else 's have'}"

    notes = []
    if metrics.unpriced:
        notes.append(f"{calls_have(metrics.unpriced)} no known price. Their cost is not included.")
    if metrics.uncounted:
        notes.append(f"{calls_have(metrics.uncounted)} no known token count. Their tokens are not included.")
    if metrics.estimated:
        calls = f"{metrics.estimated:,} call{'' if metrics.estimated == 1 else 's'}"
        notes.append(f"The cost of {calls} is estimated from list prices or the machine's time.")
    return notes


def _largest_first(series: Series) -> list[str]:
    """Return the names of the lines by their sum. All charts use this order, so that a name keeps its colour."""
    lines = sorted(series.lines, key=lambda line: -sum(value or 0 for value in line.values))
    return [line.name for line in lines]


def _limit_lines(series: Series, order: list[str]) -> Series:
    """Sort the lines of an additive series, and add those beyond MAX_LINES up to one."""
    lines = sorted(series.lines, key=lambda line: order.index(line.name) if line.name in order else len(order))
    if len(lines) > MAX_LINES:
        rest = lines[MAX_LINES - 1 :]
        sums = []
        for bin_values in zip(*(line.values for line in rest), strict=True):
            known = [value for value in bin_values if value is not None]
            sums.append(sum(known) if known else None)
        lines = [*lines[: MAX_LINES - 1], SeriesLine(f"{len(rest)} others, total", tuple(sums))]
    return replace(series, lines=tuple(lines))


def _chart(
    title: str, subtitle: str, label: str, series: Series, name_of: Callable[[str], str] = str
) -> dict[str, Any]:
    """Return a chart over time, with each value as a number for its line and as text for legend and table.

    Args:
        title: Title of the chart.
        subtitle: What it shows.
        label: Label of its y axis.
        series: The values; None is a gap in the line.
        name_of: Returns the displayed name of a line.
    """
    known = [value for line in series.lines for value in line.values if value is not None]
    return {
        "title": title,
        "subtitle": subtitle,
        "label": label,
        "unit": series.unit,
        "lines": [
            {
                "name": _shorten(name_of(line.name)),
                "values": list(line.values),
                "texts": [format_value(series.measure, value) for value in line.values],
            }
            for line in series.lines
        ],
        "max_text": format_value(series.measure, max(known)) if known else "",
    }


def _format_bin(start: datetime, size: str) -> str:
    return start.strftime(BIN_FORMATS[size])


def _scatter_point(dot: ScatterPoint, title: str) -> dict[str, Any]:
    cells = [
        f"{dot.calls:,}",
        format_seconds(dot.latency),
        UNKNOWN if dot.reward is None else f"{dot.reward:.3f}",
        format_value("cost_per_request", dot.cost_per_request),
    ]
    return {"name": _shorten(title), "calls": dot.calls, "x": dot.latency, "y": dot.reward, "cells": cells}


def _format_cost(amount: ModelCost) -> str:
    if amount.cost is None:
        return "unknown"
    unpriced = f", plus {amount.unpriced:,} calls without a known price" if amount.unpriced else ""
    return format_money(amount.cost) + unpriced


def _bars(rows: Sequence[tuple[str, float | None, str]]) -> list[dict[str, Any]]:
    """Return a bar chart of (name, value, text) rows; the longest bar has the fraction 1."""
    maximum = max((value for _, value, _ in rows if value), default=0.0)
    return [
        {"name": _shorten(name), "fraction": (value or 0) / maximum if maximum else 0.0, "text": text}
        for name, value, text in rows
    ]


def _recent_row(event: UsageEvent, zone: str, model_of: Callable[[str], ModelLabel]) -> list[str]:
    """Return the cells of an event in the table of recent calls, whose header is in the template."""
    tokens = UNKNOWN if event.tokens_in is None else f"{event.tokens_in:,} + {event.tokens_out:,}"
    cost = format_value("cost", event.cost)
    return [
        event.time.astimezone(ZoneInfo(zone)).strftime("%d %b %H:%M:%S"),
        _shorten(event.branch),
        _shorten(" · ".join(dict.fromkeys(model_of(name).title for name in (event.model, event.adapter) if name))),
        _shorten(event.skill),
        _shorten(f"{event.outcome}: {event.error}" if event.error else event.outcome),
        format_seconds(event.latency),
        f"{tokens} (estimated)" if event.tokens_basis == "estimated" else tokens,
        f"{cost} (estimated)" if event.cost_basis == "estimated" else cost,
        UNKNOWN if event.reward is None else f"{event.reward:.3f}",
    ]


def _budget(status: BudgetStatus) -> dict[str, Any]:
    budget = status.budget
    spent = f"{format_money(status.spent)} of {format_money(budget.limit)} this month (UTC), {100 * status.share:.0f} %"
    unpriced = f"; {status.unpriced:,} calls have no known price" if status.unpriced else ""
    return {
        "branch": budget.branch,
        "name": _shorten(budget.branch) or "All branches",
        "text": spent + unpriced,
        "fraction": min(1.0, status.share),
        "state": status.state,
        "stop": budget.stop,
    }
