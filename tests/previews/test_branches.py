"""The branch demo: this application, real processes with real hot reload, behind a stand-in for the Hub (see there)."""

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

ROOT = Path(__file__).resolve().parents[2]
APP = "moondream-playground"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SpacesServer]:
    with spaces_server(tmp_path_factory.mktemp("hub") / "hub") as running:
        yield running


@pytest.fixture
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of a database that previews share: PostgreSQL, or SQLite where there is none."""
    try:
        return request.getfixturevalue("postgres_url")
    except pytest.skip.Exception:
        return f"sqlite:///{tmp_path / 'shared.sqlite3'}"


@pytest.fixture
def repository(tmp_path: Path, hub: SpacesServer, database: str) -> PreviewRepository:
    (tmp_path / "repository").mkdir()
    return PreviewRepository(tmp_path / "repository", hub, database)


def shown(url: str) -> tuple[str, str]:
    """What the application at an address says it is, and its page's configuration."""
    health = httpx.get(f"{url}/healthz").json()
    return health["revision"], httpx.get(f"{url}/config").text


def ask(url: str) -> None:
    """A model call, which counts in the usage of who answers it."""
    photo = base64.b64encode((ROOT / "assets" / "photos" / "chelsea.jpg").read_bytes()).decode()
    asked = {"image_url": f"data:image/jpeg;base64,{photo}", "question": "Is it bright or dark?"}
    httpx.post(f"{url}/v1/query", json=asked, timeout=60).raise_for_status()


def counted(url: str) -> set[tuple[str, str, str]]:
    """Branch, commit and Space of the calls of the last day, as a preview's dashboard has them."""
    rows = csv.DictReader(httpx.get(f"{url}/v1/usage.csv").text.splitlines())
    return {(row["branch"], row["commit"], row["space"]) for row in rows}


@pytest.mark.timeout(280)
def test_branches_live_side_by_side_until_they_are_swept(repository: PreviewRepository, hub: SpacesServer) -> None:
    at, main = repository, repository.git("rev-parse", "HEAD")

    # A deploys, by a build
    at.git("checkout", "-q", "-b", "feature/A")
    first = at.commit("a branch")
    done = at.previews("deploy", "--branch", "feature/A", "--variable", "COLOUR=red", "--secret", "DATABASE_URL")
    assert (done["path"], done["sha"], done["fallbacks"]) == ("build", first, [])
    a = done["url"]
    space_a = hub.spaces[f"{OWNER}/{space_name(OWNER, APP, 'feature/A')}"]
    assert space_a.asked["visibility"] == "private" and space_a.variables["COLOUR"] == "red"
    assert shown(a)[0] == first and "feature/A" in shown(a)[1] and first[:7] in shown(a)[1]

    # a change of its page is hot-reloaded, and only what changed is sent
    second = at.edit("ui/playground/tab.py", BUTTON, 'gr.Button("Reward of A"')
    done = at.previews("deploy", "--branch", "feature/A")
    assert (done["path"], done["fallbacks"], space_a.starts) == ("hot reload", [], 1)
    assert [names for _, hot, names in hub.uploads[-2:] if hot] == [["ui/playground/tab.py"], ["app.py"]]
    assert shown(a)[0] == second and "Reward of A" in shown(a)[1]

    # the same again does nothing
    uploads = len(hub.uploads)
    done = at.previews("deploy", "--branch", "feature/A")
    assert done["path"] == "nothing" and len(hub.uploads) == uploads and "already" in at.stderr

    # B deploys; both answer, each with its own commit
    at.git("checkout", "-q", "-b", "b_ütf", "main")
    third = at.edit("ui/playground/tab.py", BUTTON, 'gr.Button("Reward of B"')
    b = at.previews("deploy", "--branch", "b_ütf", "--secret", "DATABASE_URL")["url"]
    assert (shown(a)[0], shown(b)[0]) == (second, third)
    assert "Reward of A" in shown(a)[1] and "Reward of B" in shown(b)[1]
    listed = {row["branch"]: row["revision"] for row in at.previews("list")}
    assert listed == {"feature/A": second[:12], "b_ütf": third[:12]}

    # they share a database: each one's dashboard has the calls of both, under the commit that runs, hot-reloaded or not
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(ask, (a, b)))
    calls = {("feature/A", second, space_a.id), ("b_ütf", third, f"{OWNER}/{space_name(OWNER, APP, 'b_ütf')}")}
    deadline = time.monotonic() + 20
    while counted(b) != calls and time.monotonic() < deadline:
        time.sleep(0.2)
    assert counted(a) == counted(b) == calls

    # what hot reload cannot show falls back: a name that another module holds
    at.git("checkout", "-q", "feature/A")
    fourth = at.edit("ui/usage/tab.py", 'TAB = "Usage"', 'TAB = "Usage of A"')
    done = at.previews("deploy", "--branch", "feature/A")
    assert done["path"] == "restart" and "other modules hold TAB" in done["reason"]
    assert shown(a)[0] == fourth and "Usage of A" in shown(a)[1]

    # code that does not run leaves the old application serving
    at.edit("ui/playground/tab.py", 'gr.Button("Reward of A"', "gr.Button((")
    uploads = len(hub.uploads)
    error = at.previews("deploy", "--branch", "feature/A", code=9)
    assert "ui/playground/tab.py, line" in error["error"] and len(hub.uploads) == uploads
    at.edit("ui/playground/tab.py", "gr.Button((", 'gr.Button("Reward A"')
    at.edit("ui/playground/tab.py", "MODELS, answer\n", "MODELS, answer\nfrom inference import no_such_name\n")
    error = at.previews("deploy", "--branch", "feature/A", code=9)
    assert "no_such_name" in error["error"] and shown(a)[0] == fourth and "Reward of A" in shown(a)[1]
    fifth = at.edit("ui/playground/tab.py", "from inference import no_such_name\n", "")
    assert at.previews("deploy", "--branch", "feature/A")["path"] == "hot reload" and shown(a)[0] == fifth

    # B is deleted and swept, and nothing else is
    foreign = hub.spaces[f"{OWNER}/{APP}-notes-123abc45"] = type(space_a)("x", at.folder, {}, {}, {})
    at.git("branch", "-q", "-D", "b_ütf")
    assert [row["branch"] for row in at.previews("sweep")] == ["b_ütf"]
    assert at.previews("sweep") == [] and foreign in hub.spaces.values() and shown(a)[0] == fifth
    del hub.spaces[f"{OWNER}/{APP}-notes-123abc45"]

    # A is promoted, then rolled back
    done = at.previews("deploy", "--branch", "main", "--production", "--sha", main)
    assert done["space"] == f"{OWNER}/{APP}" and shown(done["url"])[0] == main
    done = at.previews("promote", "--branch", "feature/A")
    assert done["sha"] == fifth and shown(done["url"])[0] == fifth and "Reward A" in shown(done["url"])[1]
    done = at.previews("rollback", "--branch", "main", "--production")
    assert done["sha"] == main and shown(done["url"])[0] == main and "Teach a model" in shown(done["url"])[1]
    assert at.previews("sweep") == []
