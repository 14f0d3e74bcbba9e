"""Figures for programs: as JSON, and as Prometheus' text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import func, select

from storage.tables import EVENTS, KINDS
from usage.analytics import UNITS, Figures, Series, Usage
from usage.budgets import Budgets
from usage.ledger import DOLLAR
from usage.recorder import Recorder
from usage.time_window import SECOND

LABELS = ("branch", "model", "skill", "outcome")
SUMS = {
    "calls_total": ("Model calls whose events are kept.", func.count(), 1),
    "latency_seconds_total": ("Time spent computing.", func.sum(EVENTS.c.latency), SECOND),
    "tokens_total": ("Tokens in and out, where known.", func.sum(EVENTS.c.tokens_in + EVENTS.c.tokens_out), 1),
    "cost_dollars_total": ("Cost, where known.", func.sum(EVENTS.c.cost), DOLLAR),
    "unpriced_calls_total": ("Calls whose cost is not known.", func.count() - func.count(EVENTS.c.cost), 1),
}


def figures_report(figures: Figures) -> dict[str, Any]:
    """Figures as JSON: each with value, before, change and unit; unknown is null, never 0."""
    named = {name: getattr(figures, name) for name in UNITS}
    return {
        "start": figures.window.start.isoformat(),
        "end": figures.window.end.isoformat(),
        "figures": {
            name: {"value": one.value, "before": one.before, "change": one.change, "unit": one.unit}
            for name, one in named.items()
        },
        "calls_without_known_cost": figures.unpriced,
        "calls_without_known_tokens": figures.uncounted,
        "calls_with_estimated_cost": figures.estimated,
        "percentile_error": figures.percentile_error,
    }


def series_report(series: Series) -> dict[str, Any]:
    """A series as JSON: the start of each bin in the filter's zone, and a list of values for each line."""
    return {
        "measure": series.measure,
        "unit": series.unit,
        "bin": series.bin,
        "starts": [start.isoformat() for start in series.starts],
        "lines": {line.name: list(line.values) for line in series.lines},
    }


def prometheus(usage: Usage, budgets: Budgets, recorder: Recorder, now: datetime | None = None) -> str:
    """Sums of all events that are kept, by branch, model, skill and outcome; budgets; events that were lost.

    The sums fall when old events are retired, which Prometheus takes for a restart, as it should. Raises StoreError.
    """
    query = select(*(KINDS.c[name] for name in LABELS), *(total for _, total, _ in SUMS.values()))
    query = query.join(EVENTS, KINDS.c.id == EVENTS.c.kind).group_by(*(KINDS.c[name] for name in LABELS))
    with usage.database.transaction() as connection:
        rows = connection.execute(query.order_by(*(KINDS.c[name] for name in LABELS))).all()
    lines: list[str] = []
    for place, (name, (words, _, one)) in enumerate(SUMS.items(), len(LABELS)):
        values = [(dict(zip(LABELS, map(str, row[:4]), strict=True)), int(row[place] or 0) / one) for row in rows]
        lines += _metric(f"moondream_{name}", words, "counter", values)
    statuses = budgets.list(now)
    for name, words in {"limit": "Monthly budget, in US dollars.", "spent": "Spent of it this month."}.items():
        values = [({"branch": s.budget.branch}, s.budget.limit if name == "limit" else s.spent) for s in statuses]
        lines += _metric(f"moondream_budget_{name}_dollars", words, "gauge", values)
    lines += _metric(
        "moondream_usage_events_lost_total", "Events without room on disk.", "counter", [({}, recorder.lost)]
    )
    return "\n".join(lines) + "\n"


def _metric(name: str, words: str, kind: str, values: Sequence[tuple[Mapping[Any, str], float]]) -> list[str]:
    lines = [f"# HELP {name} {words}", f"# TYPE {name} {kind}"]
    for labels, value in values:
        inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        lines.append(f"{name}{{{inside}}} {value:.17g}" if inside else f"{name} {value:.17g}")
    return lines


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n").replace("\r", " ")
