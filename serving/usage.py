"""GET /v1/usage: the figures as JSON. GET /v1/usage.csv and .parquet: the events. GET /metrics: for Prometheus."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Query
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from storage.reward_functions import StoreError
from usage.analytics import Usage
from usage.budgets import Budgets
from usage.export import export
from usage.recorder import Recorder
from usage.report import figures_report, prometheus
from usage.time_window import Filter, FilterError

Names = Annotated[list[str], Field(max_length=50)]
MEDIA = {"csv": "text/csv; charset=utf-8", "parquet": "application/vnd.apache.parquet"}


class UsageFilterQuery(BaseModel):
    """A filter as an address has it; see usage.time_window.Filter. A start or end without an offset is in `zone`."""

    model_config = ConfigDict(extra="forbid")

    period: str = "day"
    branch: Names = []
    model: Names = []
    skill: Names = []
    outcome: Names = []
    zone: str = "UTC"
    start: datetime | None = None
    end: datetime | None = None

    def filter(self) -> Filter:
        """Raises HTTPException with what to change."""
        names = {
            "branches": tuple(self.branch),
            "models": tuple(self.model),
            "skills": tuple(self.skill),
            "outcomes": tuple(self.outcome),
        }
        try:
            return Filter(self.period, zone=self.zone, start=self.start, end=self.end, **names)
        except FilterError as error:
            raise HTTPException(400, str(error)) from None


def router(usage: Usage, budgets: Budgets, recorder: Recorder) -> APIRouter:
    """The routes. They only read."""
    routes = APIRouter()

    @routes.get("/v1/usage")
    def figures(asked: Annotated[UsageFilterQuery, Query()]) -> JSONResponse:
        wanted = asked.filter()
        return JSONResponse(_answered(lambda: figures_report(usage.figures(wanted))))

    @routes.get("/v1/usage.{kind}")
    def events(kind: Literal["csv", "parquet"], asked: Annotated[UsageFilterQuery, Query()]) -> StreamingResponse:
        wanted = asked.filter()
        pieces = export(usage.database, wanted, kind)
        first = _answered(lambda: next(pieces))  # a database that is down is an error, not an empty file
        name = f"usage-{re.sub(r'[^a-z0-9]+', '-', wanted.period)}.{kind}"
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return StreamingResponse(_from(first, pieces), media_type=MEDIA[kind], headers=headers)

    @routes.get("/metrics")
    def metrics() -> PlainTextResponse:
        text = _answered(lambda: prometheus(usage, budgets, recorder))
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return routes


def _answered(question: Any) -> Any:
    try:
        return question()
    except StoreError as error:
        raise HTTPException(503, str(error)) from None


def _from(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest
