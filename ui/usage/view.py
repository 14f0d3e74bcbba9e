"""The Usage dashboard as the page shows it: one gr.HTML whose value is a snapshot as JSON, drawn by dashboard.js.

Numbers become words here, with their unit, so that page, tables and tests say the same. The template is static: no name
of a branch or a model passes through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import gradio as gr

from usage.analytics import Amount, Count, Dashboard, Dot, Figure, Figures, Line, Series
from usage.budgets import BudgetStatus
from usage.events import Event

HERE = Path(__file__).resolve().parent
LINES = 8  # that a chart shows; the smaller ones beyond are one line together
NAME = 120  # characters of a name that are shown
FIGURES = {
    "calls": "Calls",
    "error_rate": "Error rate",
    "p50": "Latency p50",
    "p95": "Latency p95",
    "p99": "Latency p99",
    "first_token": "Time to first token",
    "tokens": "Tokens",
    "cost": "Cost",
    "cost_per_request": "Cost per request",
    "reward_per_cent": "Reward per cent",
}
# What a rise means: good, bad, or neither.
RISE = {
    "reward_per_cent": 1,
    **dict.fromkeys(("error_rate", "p50", "p95", "p99", "first_token", "cost_per_request"), -1),
}
UNKNOWN = "–"


def dashboard_view() -> gr.HTML:
    """The component. It fires `budget` with {do, branch, limit, stop} and `demonstrate`."""
    return gr.HTML(
        value=None,
        html_template=(HERE / "dashboard.html").read_text(encoding="utf-8"),
        js_on_load=(HERE / "dashboard.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        elem_id="dashboard",
    )


def dashboard_value(
    shown: Dashboard, recent: Sequence[Event], budgets: Sequence[BudgetStatus], zone: str, by: str, here: str
) -> dict[str, Any]:
    """The snapshot. by: "branch" or "model", of which the charts have a line each; here: this deployment's branch."""
    figures, largest = shown.figures, _largest(shown.volume)
    return {
        "quiet": not figures.calls.value,
        "period": _period(figures, zone),
        "figures": [_figure(name, getattr(figures, name)) for name in FIGURES],
        "notes": _notes(figures),
        "branches": [
            {"name": _name(name), "cells": [words(of, getattr(one, of).value) for of in FIGURES]}
            for name, one in shown.by_branch
        ],
        "heads": list(FIGURES.values()),
        "charts": [
            _chart("Calls", f"per {shown.volume.bin}, by {by}", _few(shown.volume, largest), zone),
            _chart("Latency", f"percentiles per {shown.latency.bin}", shown.latency, zone),
            _chart("Cost", f"per {shown.cost.bin}, by {by}", _few(shown.cost, largest), zone),
        ],
        "dots": [_dot(dot) for dot in shown.scatter],
        "amounts": _bars([(one.name, one.cost, _amount(one)) for one in shown.cost_per_model]),
        "errors": _bars([(_error(one), one.calls, f"{one.calls:,}") for one in shown.errors]),
        "recent": [_recent(event, zone) for event in recent],
        "budgets": [_budget(status) for status in budgets],
        "here": here,
    }


# ── Words for numbers ───────────────────────────────────────────────────────────────────────────────────────────────


def words(measure: str, value: float | None) -> str:
    """A value of a measure of FIGURES, or of "latency", with its unit."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return _WORDS[measure](value)


def money(dollars: float) -> str:
    """US dollars with as many digits as it takes to tell small amounts apart: at least two, and three that count."""
    if dollars == 0:
        return "$0"
    digits = max(2, 2 - math.floor(math.log10(abs(dollars))))
    return f"${dollars:,.{min(digits, 12)}f}"


def seconds(value: float) -> str:
    """A duration in seconds; below one in milliseconds."""
    if value < 1:
        return f"{_three(value * 1000)} ms"
    return f"{_three(value)} s"


def _three(value: float) -> str:
    """Three digits that count, and all before the point."""
    if value == 0:
        return "0"
    return f"{value:,.{max(0, min(6, 2 - math.floor(math.log10(abs(value)))))}f}"


_WORDS: dict[str, Callable[[float], str]] = {
    **dict.fromkeys(("calls", "tokens"), lambda value: f"{value:,.0f}"),
    **dict.fromkeys(("latency", "p50", "p95", "p99", "first_token"), seconds),
    **dict.fromkeys(("cost", "cost_per_request"), money),
    "error_rate": lambda value: f"{100 * value:.{0 if value in (0, 1) else 2}f} %",
    "reward_per_cent": _three,
}


def _name(text: str) -> str:
    """A name of any length and in any script, at a length that a page can show."""
    return text if len(text) <= NAME else text[: NAME - 1] + "…"


# ── Parts ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _figure(name: str, figure: Figure) -> dict[str, Any]:
    change = figure.change
    judged = 0 if change is None or abs(change) < 0.0005 else RISE.get(name, 0) * (1 if change > 0 else -1)
    told = "" if change is None else f"{100 * change:+,.1f} %"
    return {
        "name": FIGURES[name],
        "value": words(name, figure.value),
        "change": told,
        "before": words(name, figure.before),
        "judged": {1: "better", -1: "worse"}.get(judged, ""),
    }


def _period(figures: Figures, zone: str) -> str:
    start, end = (moment.astimezone(ZoneInfo(zone)) for moment in (figures.window.start, figures.window.end))
    return f"{start:%d %b %Y %H:%M} to {end:%d %b %Y %H:%M}, {zone}. Changes: against the period of that length before."


def _notes(figures: Figures) -> list[str]:
    """What the figures do not know."""
    notes = []
    if figures.unpriced:
        notes.append(f"{_calls(figures.unpriced)} no known price: their cost is not counted.")
    if figures.uncounted:
        notes.append(f"{_calls(figures.uncounted)} no known number of tokens: they are not counted.")
    if figures.estimated:
        notes.append(f"The cost of {figures.estimated:,} calls is estimated from a price list.")
    if figures.percentile_error:
        notes.append(f"Percentiles of so many calls are exact to {100 * figures.percentile_error:g} %.")
    return notes


def _calls(count: int) -> str:
    return f"{count:,} call{' has' if count == 1 else 's have'}"


def _largest(series: Series) -> list[str]:
    """The names of its lines, the largest first: every chart keeps this order, and so a line its colour."""
    ranked = sorted(series.lines, key=lambda line: -sum(value or 0 for value in line.values))
    return [line.name for line in ranked]


def _few(series: Series, order: list[str]) -> Series:
    """The lines in this order; of a measure that can be added up, those beyond LINES as one line."""
    lines = sorted(series.lines, key=lambda line: order.index(line.name) if line.name in order else len(order))
    if len(lines) > LINES:
        rest = lines[LINES - 1 :]
        columns = zip(*(line.values for line in rest), strict=True)
        known = ([value for value in column if value is not None] for column in columns)
        added = tuple(sum(values) if values else None for values in known)
        lines = [*lines[: LINES - 1], Line(f"{len(rest)} others", added)]
    return replace(series, lines=tuple(lines))


def _chart(title: str, about: str, series: Series, zone: str) -> dict[str, Any]:
    """A chart over time: numbers to draw by, and the same in words for whoever hovers or reads the table."""
    measure = series.measure
    lines = [
        {"name": _name(line.name), "values": list(line.values), "words": [words(measure, one) for one in line.values]}
        for line in series.lines
    ]
    known = [value for line in series.lines for value in line.values if value is not None]
    top = max(known, default=0.0)
    return {
        "title": title,
        "about": about,
        "unit": series.unit,
        "starts": [_when(start, series.bin) for start in series.starts],
        "lines": lines,
        "top": top,
        "high": words(measure, top) if known else "",
        "zone": zone,
    }


def _when(start: datetime, size: str) -> str:
    form = {"minute": "%H:%M", "hour": "%d %b %H:%M", "6 hours": "%d %b %H:%M", "day": "%d %b", "month": "%b %Y"}
    return start.strftime(form[size])


def _dot(dot: Dot) -> dict[str, Any]:
    price = UNKNOWN if dot.cost_per_request is None else money(dot.cost_per_request)
    cells = [f"{dot.calls:,}", seconds(dot.latency), UNKNOWN if dot.reward is None else f"{dot.reward:.3f}", price]
    return {"name": _name(dot.model), "calls": dot.calls, "x": dot.latency, "y": dot.reward, "cells": cells}


def _amount(amount: Amount) -> str:
    if amount.cost is None:
        return "unknown"
    return money(amount.cost) + (f", and {amount.unpriced:,} calls without a known price" if amount.unpriced else "")


def _error(count: Count) -> str:
    return count.name or "no class told"


def _bars(rows: Sequence[tuple[str, float | None, str]]) -> list[dict[str, Any]]:
    """Names with a value, longest bar 1."""
    top = max((value for _, value, _ in rows if value), default=0.0)
    return [
        {"name": _name(name), "share": (value or 0) / top if top else 0.0, "words": told} for name, value, told in rows
    ]


def _recent(event: Event, zone: str) -> list[str]:
    """The cells of one call; the heads are in the template."""
    tokens = UNKNOWN if event.tokens_in is None else f"{event.tokens_in:,} + {event.tokens_out:,}"
    about = f" ({event.tokens_basis})" if event.tokens_basis == "estimated" else ""
    cost = UNKNOWN if event.cost is None else money(event.cost)
    cost += " (estimated)" if event.cost_basis == "estimated" else ""
    outcome = f"{event.outcome}: {event.error}" if event.error else event.outcome
    model = f"{event.model} + {event.adapter}" if event.adapter else event.model
    return [
        event.time.astimezone(ZoneInfo(zone)).strftime("%d %b %H:%M:%S"),
        _name(event.branch),
        _name(model),
        _name(event.skill),
        _name(outcome),
        seconds(event.latency),
        tokens + about,
        cost,
        UNKNOWN if event.reward is None else f"{event.reward:.3f}",
    ]


def _budget(status: BudgetStatus) -> dict[str, Any]:
    budget = status.budget
    spent = f"{money(status.spent)} of {money(budget.limit)} this month (UTC), {100 * status.share:.0f} %"
    more = f"; {status.unpriced:,} calls have no known price" if status.unpriced else ""
    return {
        "branch": budget.branch,
        "name": _name(budget.branch) or "All branches",
        "words": spent + more,
        "share": min(1.0, status.share),
        "state": status.state,
        "stop": budget.stop,
        "limit": budget.limit,
    }
