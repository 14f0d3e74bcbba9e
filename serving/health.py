"""GET /healthz: version, deployment, loaded models, and whether the database can be reached."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter
from pydantic import BaseModel
from sqlalchemy import text

from inference.registry import loaded_models
from storage.database import Database, StoreError
from usage.events import Deployment


class Health(BaseModel):
    """State of this process. `status` is "ok" whenever the process serves requests; models are loaded on first use."""

    status: str = "ok"
    version: str
    branch: str
    revision: str | None
    space: str | None
    models_loaded: list[str]
    store: str


def router(version: str, get_deployment: Callable[[], Deployment], database: Database) -> APIRouter:
    """Create the route.

    Args:
        version: Version of the application.
        get_deployment: Returns the running deployment, which hot reload changes.
        database: The database to check.
    """
    routes = APIRouter()

    @routes.get("/healthz")
    def healthz() -> Health:
        deployment = get_deployment()
        return Health(
            version=version,
            branch=deployment.branch,
            revision=deployment.commit or None,
            space=deployment.space or None,
            models_loaded=loaded_models(),
            store="ok" if _is_reachable(database) else "unreachable",
        )

    return routes


def _is_reachable(database: Database) -> bool:
    try:
        with database.transaction() as connection:
            connection.execute(text("SELECT 1"))
    except StoreError:
        return False
    return True
