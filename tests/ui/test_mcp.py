"""Tests of the tools for agents, with the official client over HTTP: every tool, photos, permissions and limits."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import numpy as np
import pytest
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client
from mcp.types import CallToolResult, ImageContent, TextContent
from PIL import Image

from access.permissions import TOOLS
from recipes import PhotoError, load_photo, parse
from settings import Settings
from tests.support.api_client import PHOTO_URL, data_url, make_picture
from tests.support.app_server import app_server
from tests.support.doc_blocks import BLOCKS, LOCAL, Block
from tests.support.usage_rows import wait_for_usage
from ui.mcp.photos import PhotoStore
from ui.mcp.tools import MAX_JPEG, small_jpeg

pytestmark = pytest.mark.slow
KEY = "a-key-of-20-letters-"
SAMPLE = "coffee.jpg"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the app to this machine's administrator. Yields its address."""
    with app_server(tmp_path_factory.mktemp("mcp")) as address:
        yield address


@asynccontextmanager
async def connect(server: str, headers: dict[str, str] | None = None) -> AsyncIterator[Any]:
    """Open the streams of the official client."""
    async with (
        httpx.AsyncClient(headers=headers, timeout=60) as client,
        streamable_http_client(f"{server}/mcp", http_client=client) as streams,
    ):
        yield streams


def session(server: str, headers: dict[str, str] | None, *calls: tuple[str, dict[str, Any]]) -> list[CallToolResult]:
    """Call tools in one session of the official client."""

    async def run() -> list[CallToolResult]:
        async with (
            connect(server, headers) as (read, write, _),
            ClientSession(read, write) as client,
        ):
            await client.initialize()
            assert {tool.name for tool in (await client.list_tools()).tools} == set(TOOLS)
            return [await client.call_tool(name, arguments) for name, arguments in calls]

    return anyio.run(run)


def call(server: str, tool: str, headers: dict[str, str] | None = None, **arguments: Any) -> CallToolResult:
    """Call one tool."""
    return session(server, headers, (tool, arguments))[0]


def texts(result: CallToolResult) -> list[Any]:
    """Return the JSON values of a successful result."""
    assert not result.isError, result.content
    return [json.loads(part.text) for part in result.content if isinstance(part, TextContent)]


def error(result: CallToolResult) -> str:
    """Return the text of a failed result."""
    assert result.isError and isinstance(result.content[0], TextContent)
    return result.content[0].text


def test_tools_describe_their_arguments(server: str) -> None:
    async def describe() -> dict[str, Any]:
        async with (
            connect(server) as (read, write, _),
            ClientSession(read, write) as client,
        ):
            await client.initialize()
            return {tool.name: tool for tool in (await client.list_tools()).tools}

    tools = anyio.run(describe)
    assert all(tool.description for tool in tools.values())
    assert tools["finish_photo"].inputSchema["required"] == ["photo"]
    assert "sample" in tools["compare"].inputSchema["properties"]["photo"]["description"]


def test_finish_photo_applies_the_best_recipe(server: str) -> None:
    result = call(server, "finish_photo", photo=SAMPLE, reward={"sharpness": 1.0}, model="one", n=4)
    (image,) = [part for part in result.content if isinstance(part, ImageContent)]
    picture = base64.b64decode(image.data)
    assert image.mimeType == "image/jpeg" and len(picture) <= MAX_JPEG
    (details,) = texts(result)
    (comparison,) = texts(call(server, "compare", photo=SAMPLE, models=["one"], n=4))
    candidates = comparison["models"][0]["candidates"]
    assert details["reward"] == max(candidate["scores"]["sharpness"] for candidate in candidates)
    assert parse(details["recipe"]).ok
    full = httpx.get(details["link"])
    assert full.headers["content-type"] == "image/jpeg" and details["link"].startswith(server)
    shown, stored = Image.open(io.BytesIO(picture)), Image.open(io.BytesIO(full.content))
    assert stored.width >= shown.width and abs(stored.width / stored.height - shown.width / shown.height) < 0.02
    scores = texts(call(server, "score", photo=details["photo"], recipes=["exposure +10", details["recipe"]]))
    assert len(scores) == 2 or len(scores[0]) == 2


def test_every_kind_of_photo_is_accepted(server: str) -> None:
    uploaded = httpx.post(f"{server}/photos", content=base64.b64decode(PHOTO_URL.partition(",")[2])).json()
    assert httpx.get(uploaded["link"]).status_code == 200
    for photo in (SAMPLE, PHOTO_URL, data_url(make_picture(), "png"), uploaded["id"]):
        (answer,) = texts(call(server, "compare", photo=photo, models=["one"], skill="caption", n=1))
        assert "pixels" in answer["models"][0]["candidates"][0]["text"]
    wait_for_usage(f"{server}/v1", lambda row: row["skill"] == "caption" and row["source"] == "api", 4)


@pytest.mark.parametrize(
    "photo",
    [
        "https://example.org/a.jpg",
        "file:///etc/passwd",
        "/etc/passwd",
        "../../etc/passwd",
        "0" * 32,
        "photos/coffee.jpg",
        "data:text/html;base64,AAAA",
        "data:image/jpeg;base64,!!!",
        "data:image/jpeg;base64,AAAA",
        "",
    ],
)
def test_anything_else_is_no_photo(server: str, photo: str) -> None:
    message = error(call(server, "score", photo=photo, recipes=["exposure +10"]))
    assert "Traceback" not in message and "data/" not in message


def test_models_and_runs(server: str) -> None:
    result = session(
        server,
        None,
        ("models", {}),
        ("retrain", {"reward": {"sharpness": 1}, "steps": 5, "name": "for an agent"}),
        ("run_status", {"run": "../../etc"}),
        ("retrain", {"reward": {"happiness": 1}}),
        ("compare", {"photo": SAMPLE, "models": ["none"]}),
        ("compare", {"photo": SAMPLE, "models": ["one"], "n": 99}),
        ("destroy", {}),
    )
    assert any(model["name"] == "moondream-tiny" for value in texts(result[0]) for model in _as_list(value))
    (run,) = texts(result[1])
    assert run["name"] == "for an agent" and run["mine"]
    (status,) = texts(call(server, "run_status", run=run["run"]))
    assert status["run"] == run["run"] and status["state"]
    messages = [error(failed) for failed in result[2:]]
    assert "happiness" in messages[1] and "destroy" in messages[4]
    assert not any("<" in message for message in messages)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def test_guests_have_the_limits_of_the_api(tmp_path: Path) -> None:
    keys = Settings.from_env({"PLAYGROUND_API_KEYS": KEY}).api_keys
    with app_server(tmp_path, api_keys=keys, host="0.0.0.0") as address:
        assert "API key" in error(call(address, "retrain", reward={"sharpness": 1}, steps=5))
        with_key = {"Authorization": f"Bearer {KEY}"}
        (run,) = texts(call(address, "retrain", with_key, reward={"sharpness": 1}, steps=5))
        assert run["mine"]
        calls = [("compare", {"photo": SAMPLE, "models": ["one"], "skill": "caption", "n": 1})] * 31
        results = session(address, None, *calls)
        assert not results[0].isError and "last minute" in error(results[-1])
        refused = httpx.post(f"{address}/photos", content=b"x")
        assert refused.status_code == 429 and refused.headers["retry-after"]


def test_pages_of_other_sites_may_not_call_tools(server: str) -> None:
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    headers = {"Accept": "application/json, text/event-stream", "Origin": "https://elsewhere.example"}
    assert httpx.post(f"{server}/mcp", json=body, headers=headers).status_code == 403
    assert httpx.post(f"{server}/photos", content=b"x", headers=headers).status_code == 403


def test_uploads_are_checked(server: str) -> None:
    assert "error" in httpx.post(f"{server}/photos", content=b"<svg onload=alert(1)>").json()
    assert httpx.post(f"{server}/photos", content=b"A" * (17 * 2**20)).status_code == 413
    for name in ("..%2f..%2fetc%2fpasswd", "0" * 32, f"{'0' * 32}.jpg", "x.jpg"):
        assert httpx.get(f"{server}/photos/{name}").status_code == 404


def test_photos_expire_and_their_number_is_limited(tmp_path: Path) -> None:
    store = PhotoStore(tmp_path / "photos", max_photos=2)
    ids = [store.save(np.full((32, 32, 3), value, np.uint8)) for value in range(3)]
    assert [store.path(photo_id) is not None for photo_id in ids] == [False, True, True]
    assert store.load(ids[2]).shape == (32, 32, 3)
    expired = PhotoStore(tmp_path / "photos", keep_seconds=0)
    assert expired.path(ids[2]) is None
    with pytest.raises(PhotoError):
        expired.load(ids[2])


def test_pictures_in_answers_are_small() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (1500, 2000, 3), dtype=np.uint8)
    data = small_jpeg(noise)
    assert len(data) <= MAX_JPEG and load_photo(data).shape[1] > 200


CONFIGURATIONS = [block for block in BLOCKS if block.page.name == "api.md" and block.language == "json"]


@pytest.mark.parametrize("block", CONFIGURATIONS, ids=[str(block.line) for block in CONFIGURATIONS])
def test_documented_configurations_connect(block: Block, tmp_path: Path) -> None:
    assert len(CONFIGURATIONS) == 3
    configuration = json.loads(block.text)
    (entry,) = next(iter(configuration.values())).values()
    keys = Settings.from_env({"PLAYGROUND_API_KEYS": KEY}).api_keys
    with app_server(tmp_path, api_keys=keys) as address:
        url = entry["url"].replace(LOCAL, address)
        headers = {name: value.replace("YOUR_KEY", KEY) for name, value in entry["headers"].items()}
        assert texts(call(url.removesuffix("/mcp"), "models", headers))
