"""GET /healthz: answers as soon as the process serves."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter()


@router.get("/healthz")
def healthz() -> dict[str, str]:
    """That the server is up. It says nothing about models: no one of them has to be loaded."""
    return {"status": "ok"}
