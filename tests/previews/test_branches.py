"""Branches of this application deployed as real processes with real hot reload, behind the simulated Hub."""

from __future__ import annotations

import base64
import csv
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from bench.preview_repository import BUTTON, OWNER, PreviewRepository
from bench.spaces_server import SpacesServer, spaces_server
from previews.names import space_name

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
APP = "moondream-playground"
API_KEY = "a-key-of-the-previews-in-this-test"
KEYS = f"PLAYGROUND_API_KEYS={API_KEY}"
HEADERS = {"Authorization": f"Bearer {API_KEY}"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SpacesServer]:
    with spaces_server(tmp_path_factory.mktemp("hub") / "hub") as running:
        yield running


@pytest.fixture
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of a database that previews share: PostgreSQL, or SQLite if it is not installed."""
    try:
        return request.getfixturevalue("postgres_url")
    except pytest.skip.Exception:
        return f"sqlite:///{tmp_path / 'shared.sqlite3'}"


@pytest.fixture
def repository(tmp_path: Path, hub: SpacesServer, database: str) -> PreviewRepository:
    (tmp_path / "repository").mkdir()
    return PreviewRepository(tmp_path / "repository", hub, database)


def revision(url: str) -> str:
    return httpx.get(f"{url}/healthz").json()["revision"]


def page(url: str) -> str:
    return httpx.get(f"{url}/config").text


def call_model(url: str) -> None:
    photo = base64.b64encode((ROOT / "assets" / "photos" / "chelsea.jpg").read_bytes()).decode()
    request = {"image_url": f"data:image/jpeg;base64,{photo}", "question": "Is it bright or dark?"}
    httpx.post(f"{url}/v1/query", json=request, headers=HEADERS, timeout=60).raise_for_status()


def recorded_calls(url: str) -> set[tuple[str, str, str]]:
    """Return branch, commit and Space of the usage events of the last day."""
    rows = csv.DictReader(httpx.get(f"{url}/v1/usage.csv", headers=HEADERS).text.splitlines())
    return {(row["branch"], row["commit"], row["space"]) for row in rows}


@pytest.mark.timeout(280)
def test_deploy_promote_rollback_and_sweep_of_two_branches(repository: PreviewRepository, hub: SpacesServer) -> None:
    main = repository.git("rev-parse", "HEAD")

    # The first deploy of A is a build.
    repository.git("checkout", "-q", "-b", "feature/A")
    first = repository.commit("a branch")
    result = repository.previews(
        "deploy", "--branch", "feature/A", "--variable", "COLOUR=red", "--variable", KEYS, "--secret", "DATABASE_URL"
    )
    assert (result["path"], result["sha"], result["fallbacks"]) == ("build", first, [])
    a = result["url"]
    space_a = hub.spaces[f"{OWNER}/{space_name(OWNER, APP, 'feature/A')}"]
    assert space_a.request["visibility"] == "private" and space_a.variables["COLOUR"] == "red"
    assert revision(a) == first and "feature/A" in page(a) and first[:7] in page(a)

    # A change of its page is hot-reloaded, and only changed files are sent.
    second = repository.edit("ui/playground/tab.py", BUTTON, '"Reward of A"')
    result = repository.previews("deploy", "--branch", "feature/A")
    assert (result["path"], result["fallbacks"], space_a.starts) == ("hot reload", [], 1)
    assert [names for _, hot, names in hub.uploads[-2:] if hot] == [["ui/playground/tab.py"], ["app.py"]]
    assert revision(a) == second and "Reward of A" in page(a)

    # Deploying the same commit again does nothing.
    uploads = len(hub.uploads)
    result = repository.previews("deploy", "--branch", "feature/A")
    assert result["path"] == "nothing" and len(hub.uploads) == uploads and "already" in repository.stderr

    # B is deployed; both respond, each with its own commit.
    repository.git("checkout", "-q", "-b", "b_ütf", "main")
    third = repository.edit("ui/playground/tab.py", BUTTON, '"Reward of B"')
    b = repository.previews("deploy", "--branch", "b_ütf", "--variable", KEYS, "--secret", "DATABASE_URL")["url"]
    assert (revision(a), revision(b)) == (second, third)
    assert "Reward of A" in page(a) and "Reward of B" in page(b)
    listed = {row["branch"]: row["revision"] for row in repository.previews("list")}
    assert listed == {"feature/A": second[:12], "b_ütf": third[:12]}

    # They share a database: each lists the calls of both, with the running commit, whether hot-reloaded or not.
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(call_model, (a, b)))
    calls = {("feature/A", second, space_a.id), ("b_ütf", third, f"{OWNER}/{space_name(OWNER, APP, 'b_ütf')}")}
    deadline = time.monotonic() + 20
    while recorded_calls(b) != calls and time.monotonic() < deadline:
        time.sleep(0.2)
    assert recorded_calls(a) == recorded_calls(b) == calls

    # A change that hot reload cannot apply falls back to a restart: a name that another module holds.
    repository.git("checkout", "-q", "feature/A")
    fourth = repository.edit("ui/usage/tab.py", 'TAB = "Usage"', 'TAB = "Usage of A"')
    result = repository.previews("deploy", "--branch", "feature/A")
    assert result["path"] == "restart" and "other modules hold TAB" in result["reason"]
    assert revision(a) == fourth and "Usage of A" in page(a)

    # Code that fails leaves the old application serving.
    repository.edit("ui/playground/tab.py", '"Reward of A"', '"Reward of A" (/')
    uploads = len(hub.uploads)
    error = repository.previews("deploy", "--branch", "feature/A", code=9)
    assert "ui/playground/tab.py, line" in error["error"] and len(hub.uploads) == uploads
    repository.edit("ui/playground/tab.py", '"Reward of A" (/', '"Reward A"')
    repository.edit(
        "ui/playground/tab.py", "import gradio as gr\n", "import gradio as gr\nfrom inference import no_such_name\n"
    )
    error = repository.previews("deploy", "--branch", "feature/A", code=9)
    assert "no_such_name" in error["error"] and revision(a) == fourth and "Reward of A" in page(a)
    fifth = repository.edit("ui/playground/tab.py", "from inference import no_such_name\n", "")
    assert repository.previews("deploy", "--branch", "feature/A")["path"] == "hot reload" and revision(a) == fifth

    # Branch B is deleted; only its preview is swept.
    foreign = hub.spaces[f"{OWNER}/{APP}-notes-123abc45"] = type(space_a)("x", repository.folder, {}, {}, {})
    repository.git("branch", "-q", "-D", "b_ütf")
    assert [row["branch"] for row in repository.previews("sweep")] == ["b_ütf"]
    assert repository.previews("sweep") == [] and foreign in hub.spaces.values() and revision(a) == fifth
    del hub.spaces[f"{OWNER}/{APP}-notes-123abc45"]

    # A is promoted, and production is rolled back.
    result = repository.previews("deploy", "--branch", "main", "--production", "--sha", main)
    assert result["space"] == f"{OWNER}/{APP}" and revision(result["url"]) == main
    result = repository.previews("promote", "--branch", "feature/A")
    assert result["sha"] == fifth and revision(result["url"]) == fifth and "Reward A" in page(result["url"])
    result = repository.previews("rollback", "--branch", "main", "--production")
    assert (
        result["sha"] == main
        and revision(result["url"]) == main
        and "Fine-tune with this reward" in page(result["url"])
    )
    assert repository.previews("sweep") == []
