"""GET /healthz: what runs here, and whether its store can be reached."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter
from pydantic import BaseModel
from sqlalchemy import text

from inference.registry import loaded_models
from storage.database import Database
from storage.reward_functions import StoreError
from usage.events import Deployment


class Health(BaseModel):
    """The state of this process. It serves, whatever the rest says; models are loaded when they are first asked."""

    status: str = "ok"
    version: str
    branch: str
    revision: str | None
    space: str | None
    models_loaded: list[str]
    store: str


def router(version: str, deployed: Callable[[], Deployment], database: Database) -> APIRouter:
    """The route. version: of the application; deployed: tells the branch and commit that run, which may change."""
    routes = APIRouter()

    @routes.get("/healthz")
    def healthz() -> Health:
        where = deployed()
        return Health(
            version=version,
            branch=where.branch,
            revision=where.commit or None,
            space=where.space or None,
            models_loaded=loaded_models(),
            store="ok" if _reachable(database) else "unreachable",
        )

    return routes


def _reachable(database: Database) -> bool:
    try:
        with database.transaction() as connection:
            connection.execute(text("SELECT 1"))
    except StoreError:
        return False
    return True
