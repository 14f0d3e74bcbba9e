"""GET /healthz: version, deployment, loaded models, and whether the database can be reached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel
from sqlalchemy import text

from inference.registry import engine_states, loaded_models
from storage.database import Database, StoreError
from usage.events import Deployment


class Health(BaseModel):
    """State of this process. Models are loaded on first use.

    Attributes:
        status: "ok", or "degraded" if an engine has failed; other models are still served.
        engines: State of every Photon engine that was needed, by model.
    """

    status: Literal["ok", "degraded"]
    version: str
    branch: str
    revision: str | None
    space: str | None
    models_loaded: list[str]
    engines: dict[str, str]
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
        deployment, engines = get_deployment(), engine_states()
        return Health(
            status="degraded" if any(state.startswith("failed") for state in engines.values()) else "ok",
            engines=engines,
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
