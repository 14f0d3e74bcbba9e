"""Tests of JSON bodies that are parsed in a thread: the schema and the errors are those of FastAPI's own parser."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from pydantic import BaseModel
from starlette.requests import Request

from serving import json_body
from serving.errors import add_exception_handlers
from serving.json_body import MAX_INLINE, JsonRoute

JSON = {"Content-Type": "application/json"}
PADDING = "A" * MAX_INLINE


class Body(BaseModel):
    """A body with nested fields."""

    numbers: list[int]
    padding: str
    options: dict[str, float] | None = None


def create_client(route_class: type[APIRoute]) -> TestClient:
    """Return a client of an application with one route."""
    app = FastAPI()
    app.router.route_class = route_class
    add_exception_handlers(app)

    @app.middleware("http")
    async def set_request_id(request: Request, call_next: Any) -> Any:
        request.state.request_id = "id"
        return await call_next(request)

    @app.post("/sum")
    async def add(body: Body) -> dict[str, Any]:
        return {"sum": sum(body.numbers), "options": body.options}

    return TestClient(app)


def test_schema_is_that_of_an_ordinary_route() -> None:
    assert create_client(JsonRoute).get("/openapi.json").json() == create_client(APIRoute).get("/openapi.json").json()


@pytest.mark.parametrize("padding", ["", PADDING])
@pytest.mark.parametrize(
    "body",
    [
        '{"numbers": [1, 2, 3], "options": {"a": 1e3}, "padding": "PAD"}',
        '{"numbers": ["1", 2.0], "padding": "PAD", "unknown": {}}',
        '{"numbers": [1], "options": {"a": Infinity}, "padding": "PAD\\ud800"}',
        '{"numbers": [1], "padding": 7, "other": "PAD"}',
        '{"numbers": [1, "x", null], "options": {"a": "b"}, "padding": "PAD"}',
        '{"padding": "PAD"}',
        '["PAD"]',
        '"PAD"',
        '{"padding": "PAD", "numbers": [1, 2',
        '{"padding": "PAD"} {}',
        '{"padding": "PAD", "numbers": ' + "[" * 5000,
        '{"padding": "PAD\x00"}',
    ],
)
def test_responses_are_those_of_an_ordinary_route(body: str, padding: str) -> None:
    content = body.replace("PAD", padding).encode()
    responses = [create_client(each).post("/sum", content=content, headers=JSON) for each in (JsonRoute, APIRoute)]
    assert responses[0].status_code == responses[1].status_code in (200, 400)
    assert responses[0].text == responses[1].text


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
def test_body_of_another_type_is_rejected_as_by_an_ordinary_route(content_type: str | None) -> None:
    content = json.dumps({"numbers": [1], "padding": PADDING}).encode()
    headers = {"Content-Type": content_type} if content_type else {}
    responses = [create_client(each).post("/sum", content=content, headers=headers) for each in (JsonRoute, APIRoute)]
    assert responses[0].status_code == 400 and responses[0].text == responses[1].text


@pytest.mark.parametrize("item", ["1,", "[1],", "{},"])
def test_large_body_with_too_many_values_is_rejected_before_it_is_parsed(
    monkeypatch: pytest.MonkeyPatch, item: str
) -> None:
    monkeypatch.setattr(json_body, "MAX_VALUES", 1000)
    client = create_client(JsonRoute)
    content = ('{"padding": "' + PADDING + '", "numbers": [' + item * 1001).encode()  # invalid JSON, if it were parsed
    response = client.post("/sum", content=content, headers=JSON)
    assert response.status_code == 413 and "more than 1,000 values" in response.json()["error"]["message"]
    few = json.dumps({"padding": PADDING, "numbers": [1] * 900}).encode()
    assert client.post("/sum", content=few, headers=JSON).json()["sum"] == 900
