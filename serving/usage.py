"""Routes for usage: GET /v1/usage (metrics as JSON), /v1/usage.csv and .parquet (events), /metrics (Prometheus)."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from itertools import chain
from typing import Annotated, Literal, TypeVar

from fastapi import APIRouter, HTTPException, Query, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from pydantic import BaseModel, ConfigDict, Field

from storage.database import StoreError
from usage.analytics import UsageAnalytics
from usage.budgets import Budgets
from usage.cache import CacheBuildingError
from usage.export import UsageCollector, export_events, metrics_report
from usage.recorder import Recorder
from usage.time_window import FilterError, UsageFilter

Names = Annotated[list[str], Field(max_length=50)]
MEDIA_TYPES = {"csv": "text/csv; charset=utf-8", "parquet": "application/vnd.apache.parquet"}
RETRY_SECONDS = "5"
T = TypeVar("T")


class UsageFilterQuery(BaseModel):
    """Query parameters of a filter; see `usage.time_window.UsageFilter`. Times without an offset are in `zone`."""

    model_config = ConfigDict(extra="forbid")

    period: str = "day"
    branch: Names = []
    model: Names = []
    skill: Names = []
    outcome: Names = []
    zone: str = "UTC"
    start: datetime | None = None
    end: datetime | None = None

    def to_filter(self) -> UsageFilter:
        """Convert to a filter.

        Raises:
            HTTPException: A value is invalid (400).
        """
        try:
            return UsageFilter(
                self.period,
                branches=tuple(self.branch),
                models=tuple(self.model),
                skills=tuple(self.skill),
                outcomes=tuple(self.outcome),
                zone=self.zone,
                start=self.start,
                end=self.end,
            )
        except FilterError as error:
            raise HTTPException(400, str(error)) from None


def router(analytics: UsageAnalytics, budgets: Budgets, recorder: Recorder) -> APIRouter:
    """Create the routes, which only read."""
    routes = APIRouter()
    registry = CollectorRegistry()
    registry.register(UsageCollector(analytics.cache, budgets, recorder))

    @routes.get("/v1/usage")
    def usage_metrics(query: Annotated[UsageFilterQuery, Query()]) -> JSONResponse:
        usage_filter = query.to_filter()
        return JSONResponse(_or_unavailable(lambda: metrics_report(analytics.metrics(usage_filter))))

    @routes.get("/v1/usage.{kind}")
    def usage_events(kind: Literal["csv", "parquet"], query: Annotated[UsageFilterQuery, Query()]) -> StreamingResponse:
        usage_filter = query.to_filter()
        chunks = export_events(analytics.cache, usage_filter, kind)
        first = _or_unavailable(lambda: next(chunks))  # an unreachable database is an error, not an empty file
        name = f"usage-{re.sub(r'[^a-z0-9]+', '-', usage_filter.period)}.{kind}"
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return StreamingResponse(chain([first], chunks), media_type=MEDIA_TYPES[kind], headers=headers)

    @routes.get("/metrics")
    def prometheus_metrics() -> Response:
        return Response(_or_unavailable(lambda: generate_latest(registry)), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return routes


def _or_unavailable(query: Callable[[], T]) -> T:
    """Run a query. Raises HTTPException (503) if the database cannot be used, or its events are being read."""
    try:
        return query()
    except CacheBuildingError as error:
        raise HTTPException(503, str(error), {"Retry-After": RETRY_SECONDS}) from None
    except StoreError as error:
        raise HTTPException(503, str(error)) from None
