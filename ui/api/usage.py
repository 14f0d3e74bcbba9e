"""Named API endpoints for usage metrics and series, with the same queries as the Usage tab."""

from __future__ import annotations

from datetime import datetime
from functools import partial
from typing import Annotated, Any

import gradio as gr
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from storage.reward_functions import StoreError
from ui.messages import as_gradio_error
from ui.services import AppServices
from usage.analytics import UsageAnalytics
from usage.export import metrics_report, series_report
from usage.time_window import FilterError, UsageFilter


def _parse_time(value: Any) -> datetime | None:
    try:
        return None if value is None else datetime.fromisoformat(str(value).replace("Z", "+00:00"))
    except ValueError:
        raise ValueError("write a time like 2026-11-01T00:00:00+01:00") from None


Names = Annotated[tuple[str, ...], Field(max_length=50)]
Time = Annotated[datetime | None, BeforeValidator(_parse_time)]


class FilterBody(BaseModel):
    """A `UsageFilter` as JSON. Times are in ISO 8601; without an offset they are local times in `zone`."""

    model_config = ConfigDict(extra="forbid")

    period: str = "day"
    branches: Names = ()
    models: Names = ()
    skills: Names = ()
    outcomes: Names = ()
    zone: str = "UTC"
    start: Time = None
    end: Time = None


def metrics(usage: UsageAnalytics, wanted: Any) -> dict[str, Any]:
    """Return the metrics of a filter such as {"period": "week", "branches": ["main"], "zone": "Europe/Berlin"}."""
    with as_gradio_error(FilterError, StoreError, title="Usage"):
        return metrics_report(usage.metrics(parse_filter(wanted)))


def series(usage: UsageAnalytics, wanted: Any, measure: str, by: str) -> dict[str, Any]:
    """Return a measure over time, with a line per branch, model, skill or outcome, or one line if `by` is empty."""
    with as_gradio_error(FilterError, StoreError, title="Usage"):
        return series_report(usage.series(parse_filter(wanted), measure, by))


def parse_filter(body: Any) -> UsageFilter:
    """Parse a filter from JSON with the keys of `FilterBody`, all optional. Raises FilterError."""
    try:
        return UsageFilter(**FilterBody.model_validate({} if body is None else body).model_dump())
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, problem['loc'])) or 'filter'}: {problem['msg']}" for problem in error.errors()]
        keys = ", ".join(FilterBody.model_fields)
        raise FilterError(f"The filter is not valid ({'; '.join(problems[:3])}). Its keys are {keys}.") from None


def build(services: AppServices) -> None:
    """Add the endpoints to the page. Their input components are not visible."""
    wanted, answer = gr.JSON(label="filter", visible=False), gr.JSON(label="answer", visible=False)
    measure, by = gr.Textbox("calls", label="measure", visible=False), gr.Textbox("", label="by", visible=False)
    add_endpoint = gr.Button(visible=False).click
    add_endpoint(partial(metrics, services.usage), wanted, answer, api_name="usage")
    add_endpoint(partial(series, services.usage), [wanted, measure, by], answer, api_name="usage_series")
