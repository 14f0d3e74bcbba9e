"""The named endpoints of usage: figures and series, by the same queries as the page."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any

import gradio as gr

from storage.reward_functions import StoreError
from ui.messages import refusal
from ui.services import AppServices
from usage.analytics import Usage
from usage.report import figures_report, series_report
from usage.time_window import Filter, FilterError

KEYS = ("period", "branches", "models", "skills", "outcomes", "zone", "start", "end")


def figures(usage: Usage, wanted: Any) -> dict[str, Any]:
    """The figures of a filter: {"period": "week", "branches": ["main"], "zone": "Europe/Berlin"}, all keys optional."""
    return _answered(lambda: figures_report(usage.figures(read_filter(wanted))))


def series(usage: Usage, wanted: Any, measure: str, by: str) -> dict[str, Any]:
    """One measure over time, with a line for each branch, model, skill or outcome, or one for all together."""
    return _answered(lambda: series_report(usage.series(read_filter(wanted), measure, by)))


def read_filter(wanted: Any) -> Filter:
    """A filter from JSON; start and end are in ISO 8601; without an offset they are in `zone`. Raises FilterError."""
    values = {} if wanted is None else wanted
    if not isinstance(values, dict) or set(values) - set(KEYS):
        raise FilterError(f"A filter is an object with some of {', '.join(KEYS)}.")
    read: dict[str, Any] = dict(values)
    for name, value in values.items():
        if name in ("start", "end"):
            read[name] = _moment(value)
        elif name in ("period", "zone"):
            read[name] = str(value)
        elif isinstance(value, list) and len(value) <= 50 and all(isinstance(each, str) for each in value):
            read[name] = tuple(value)
        else:
            raise FilterError(f"{name} must be a list of at most 50 names.")
    return Filter(**read)


def _moment(value: Any) -> datetime | None:
    try:
        return None if value is None else datetime.fromisoformat(str(value).replace("Z", "+00:00"))
    except ValueError:
        raise FilterError("Write start and end like 2026-11-01T00:00:00+01:00.") from None


def _answered(question: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return question()
    except (FilterError, StoreError) as error:
        raise refusal(str(error), "Usage") from None


def build(services: AppServices) -> None:
    """The endpoints."""
    wanted, answer = gr.JSON(label="filter", visible=False), gr.JSON(label="answer", visible=False)
    measure, by = gr.Textbox("calls", label="measure", visible=False), gr.Textbox("", label="by", visible=False)
    call = gr.Button(visible=False).click
    call(partial(figures, services.usage), wanted, answer, api_name="usage")
    call(partial(series, services.usage), [wanted, measure, by], answer, api_name="usage_series")
