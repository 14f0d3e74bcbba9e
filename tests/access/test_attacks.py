"""Attacks over plain HTTP: with the session hash of another visitor, from another site, and on what belongs to others.

Each attack is paired with the same request of the visitor whose session or run it is, which works.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from access.middleware import FOREIGN_ORIGIN
from access.permissions import NO_SESSION
from tests.support.app_server import app_server
from tests.support.page_client import Outcome, PageClient
from tests.support.runs import until
from tests.support.space_server import API_KEY, METRICS_TOKEN, SpaceServer
from training.data.bundled import bundled_photos

pytestmark = pytest.mark.slow
RUN, CANCEL = "ui.playground.tab.run_clicked", "ui.playground.tab.cancel"
FULL_SIZE, REPORT = "ui.playground.tab.render_full_size", "ui.playground.tab.write_report"
RETRAIN, ACT = "ui.finetune.tab.retrain_clicked", "ui.finetune.tab.action_clicked"
DOWNLOAD, PUSH = "ui.finetune.tab.download_clicked", "ui.finetune.tab.push_clicked"
CANDIDATE = {"model": "one", "index": 0}
PHOTO = bundled_photos("held-out")[0].path
ATTACKERS = ("own cookie", "own cookie and page secret", "page secret", "nothing", "signed in")


@pytest.fixture(scope="module")
def attackers(space: SpaceServer) -> dict[str, PageClient]:
    cookie_only = PageClient(space.address, space.host, page_secret=False)
    cookie_only.open()
    return {
        "own cookie": cookie_only,
        "own cookie and page secret": space.guest(),
        "page secret": PageClient(space.address, space.host, block_cookies=True),
        "nothing": PageClient(space.address, space.host, block_cookies=True, page_secret=False),
        "signed in": space.signed_in("bob"),
    }


def start_comparison(space: SpaceServer, client: PageClient, model: str, count: int = 2) -> str:
    """Start a comparison of one model and return the id of the call."""
    photo = client.upload("victims-photo.jpg", PHOTO.read_bytes())
    number = space.number(RUN)
    response = client.join(number, client.inputs(number, photo=photo, models=[model], n=count, seed=7))
    assert response.status_code == 200, response.text
    return response.json()["event_id"]


def finish(client: PageClient) -> tuple[str, list[str]]:
    """Wait for the end of a comparison; return the status of its model and the candidates' texts."""
    [completed] = [message for message in client.messages() if message["msg"] == "process_completed"]
    assert completed["success"], completed
    [column] = completed["output"]["data"][0]["columns"]
    return column["status"], [candidate["text"] for candidate in column["candidates"]]


@dataclass(frozen=True)
class Victim:
    """A visitor who has run a comparison."""

    client: PageClient
    texts: list[str]


@pytest.fixture(scope="module")
def victim(space: SpaceServer) -> Victim:
    client = space.guest()
    start_comparison(space, client, "one")
    status, texts = finish(client)
    assert status == "done" and len(texts) == 2
    return Victim(client, texts)


# ── What a session holds ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ATTACKERS)
def test_another_visitors_picture_and_report(
    space: SpaceServer, attackers: dict[str, PageClient], victim: Victim, kind: str
) -> None:
    """As in the review of November 2026: a session hash was enough to get the photo in full size."""
    attacker = attackers[kind]
    for name, event_data in ((FULL_SIZE, CANDIDATE), (REPORT, None)):
        number = space.number(name)
        outcome = attacker.call(number, event_data=event_data, session_hash=victim.client.session_hash)
        assert not outcome.success and outcome.data is None
        assert outcome.error == NO_SESSION if kind == "nothing" else outcome.title in ("Download", "Report")
        assert not attacker.run(number, attacker.default_inputs(number), event_data, victim.client.session_hash).success
    files = [
        victim.client.call(space.number(FULL_SIZE), event_data=CANDIDATE),
        victim.client.call(space.number(REPORT)),
    ]
    picture, report = (victim.client.request("GET", _file_path(outcome)) for outcome in files)
    assert picture.status_code == 200 and picture.content.startswith(b"\xff\xd8")
    answers = report.json()["models"][0]["candidates"]
    assert len(answers) == len(victim.texts)


def _file_path(outcome: Outcome) -> str:
    """Return the address of a file that a handler returned. Its folder has a random or content-derived name."""
    [file] = outcome.data
    assert len(Path(file["path"]).parent.name) >= 32
    return f"/gradio_api/file={file['path']}"


def test_a_browser_that_blocks_cookies(space: SpaceServer) -> None:
    """A Space is shown in a frame on another site; where cookies are blocked there, the page's secret is used."""
    framed = PageClient(space.address, space.host, block_cookies=True)
    framed.open()
    start_comparison(space, framed, "one")
    assert finish(framed)[0] == "done" and framed.cookies == {}
    assert framed.call(space.number(FULL_SIZE), event_data=CANDIDATE).success
    assert framed.call(space.number(REPORT)).success
    reloaded = PageClient(space.address, space.host, block_cookies=True)
    assert not reloaded.call(space.number(REPORT), session_hash=framed.session_hash).success


def test_a_browser_without_cookie_and_secret_starts_nothing(space: SpaceServer) -> None:
    client = PageClient(space.address, space.host, block_cookies=True, page_secret=False)
    photo = client.upload("photo.jpg", PHOTO.read_bytes())
    outcome = client.call(space.number(RUN), client.inputs(space.number(RUN), photo=photo, models=["one"]))
    assert outcome.refused and outcome.error == NO_SESSION


def test_on_localhost(tmp_path: Path) -> None:
    """Plain http, with an ordinary cookie; the same rules hold between two browsers."""
    with app_server(tmp_path) as address:
        browser, other = PageClient(address, page_secret=False), PageClient(address, page_secret=False)
        assert "Secure" not in browser.open().headers["set-cookie"]
        other.open()
        names = {item["api_name"]: item["id"] for item in browser.config()["dependencies"]}
        run, full_size = names["run_clicked"], names["render_full_size"]
        photo = browser.upload("photo.jpg", PHOTO.read_bytes())
        assert browser.call(run, browser.inputs(run, photo=photo, models=["one"], n=1)).success
        assert browser.call(full_size, event_data=CANDIDATE).success
        assert not other.call(full_size, event_data=CANDIDATE, session_hash=browser.session_hash).success


# ── A running comparison ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ATTACKERS)
def test_another_visitors_running_comparison(space: SpaceServer, attackers: dict[str, PageClient], kind: str) -> None:
    """None of these stops it, and none of its messages goes to someone else."""
    attacker, client = attackers[kind], space.guest()
    event = start_comparison(space, client, "slow", count=1)
    stolen = client.session_hash
    for path in (f"/gradio_api/queue/data?session_hash={stolen}", f"/gradio_api/call/compare/{stolen}"):
        text = read_stream(attacker, path)
        assert text.count("data: ") == 1 and "404" in text, text
    attacker.call(space.number(CANCEL), session_hash=stolen)
    attacker.run(space.number(CANCEL), [None], session_hash=stolen)
    attacker.request(
        "POST",
        "/gradio_api/cancel",
        json={"session_hash": stolen, "fn_index": space.number(RUN), "event_id": "0" * 32},
    )
    attacker.request("POST", "/gradio_api/reset", json={"event_id": event})
    with attacker.stream("GET", f"/gradio_api/heartbeat/{stolen}") as heartbeat:
        assert heartbeat.status_code == 200
        next(heartbeat.iter_lines())  # the connection is closed here, which ends the session that it belongs to
    status, [text] = finish(client)
    assert status == "done" and text


def read_stream(client: PageClient, path: str, headers: dict[str, str] | None = None) -> str:
    """Return what a stream sends until the server ends it. Gradio closes the connection after an unknown session."""
    text = ""
    headers = client.headers() if headers is None else headers
    with client.http.stream("GET", path, headers=headers) as response, suppress(httpx.RemoteProtocolError):
        for part in response.iter_text():
            text += part
    return text


def test_the_visitor_cancels_the_own_comparison(space: SpaceServer) -> None:
    client = space.guest()
    start_comparison(space, client, "slow", count=4)
    cancelled = False
    for message in client.messages():
        if message["msg"] == "process_generating" and not cancelled:
            assert client.run(space.number(CANCEL), [None]).success
            cancelled = True
        if message["msg"] == "process_completed":
            assert message["output"]["data"][0]["columns"][0]["status"] == "cancelled"
    assert cancelled


# ── Runs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def list_runs(space: SpaceServer, client: PageClient) -> dict[str, dict[str, Any]]:
    [runs] = client.call(space.number("ui.api.runs.runs_requested")).data
    return {run["run"]: run for run in runs}


def start_run(space: SpaceServer, client: PageClient, name: str, seed: int) -> str:
    """Start a simulated run and return its id; see `fake_run` for seeds."""
    number = space.number(RETRAIN)
    outcome = client.call(number, client.inputs(number, tune_name=name, tune_seed=seed))
    assert outcome.success, outcome
    [run] = [run for run, summary in list_runs(space, client).items() if summary["name"] == name]
    return run


def act(space: SpaceServer, client: PageClient, run: str, action: str, session_hash: str = "") -> Outcome:
    event_data = {"run": run, "action": action, "name": "renamed by the attacker"}
    return client.call(space.number(ACT), event_data=event_data, session_hash=session_hash)


@pytest.fixture(scope="module")
def ada(space: SpaceServer) -> PageClient:
    return space.signed_in("ada")


@pytest.fixture(scope="module")
def finished_run(space: SpaceServer, ada: PageClient) -> str:
    run = start_run(space, ada, "Ada's finished run", seed=11)
    until(lambda: list_runs(space, ada)[run]["in_use"])  # for its owner, because it wins
    return run


@pytest.fixture
def running_run(space: SpaceServer, ada: PageClient) -> Iterator[str]:
    run = start_run(space, ada, f"Ada's running run {time.monotonic_ns()}", seed=311)
    until(lambda: list_runs(space, ada)[run]["step"] == 3)
    yield run
    act(space, ada, run, "cancel")
    until(lambda: list_runs(space, ada)[run]["state"] == "cancelled")


@pytest.mark.parametrize("kind", ATTACKERS)
def test_another_users_finished_run(
    space: SpaceServer, attackers: dict[str, PageClient], ada: PageClient, finished_run: str, kind: str
) -> None:
    attacker, before = attackers[kind], list_runs(space, ada)[finished_run]
    for session_hash in ("", ada.session_hash):
        for action in ("rename", "revert", "delete", "use", "share", "unshare", "resume", "run", "cancel"):
            outcome = act(space, attacker, finished_run, action, session_hash)
            assert not outcome.success and outcome.error, (action, outcome)
            assert list_runs(space, ada)[finished_run] == before, action
        download = attacker.call(space.number(DOWNLOAD), event_data={"run": finished_run}, session_hash=session_hash)
        assert not download.success and download.data is None and download.error
        push = attacker.call(space.number(PUSH), [finished_run, "bob/stolen", "hf_token", True], None, session_hash)
        assert not push.success and push.error
    for name in ("cancel_run", "use_run", "revert"):
        outcome = attacker.call(space.number(f"ui.api.runs.{name}_requested"), [finished_run])
        assert not outcome.success and outcome.error
    assert list_runs(space, ada)[finished_run] == before


@pytest.mark.parametrize("kind", ATTACKERS)
def test_another_users_running_run(
    space: SpaceServer, attackers: dict[str, PageClient], ada: PageClient, running_run: str, kind: str
) -> None:
    attacker = attackers[kind]
    for session_hash in ("", ada.session_hash):
        for action in ("cancel", "delete", "rename"):
            outcome = act(space, attacker, running_run, action, session_hash)
            assert not outcome.success and outcome.error, (action, outcome)
    assert not attacker.call(space.number("ui.api.runs.cancel_run_requested"), [running_run]).success
    summary = list_runs(space, ada)[running_run]
    assert (summary["state"], summary["step"]) == ("running", 3) and summary["name"].startswith("Ada's")


def test_the_owner_and_administrators_change_a_run(space: SpaceServer, ada: PageClient) -> None:
    first, second = (start_run(space, ada, f"Ada's own {number}", seed=20 + number) for number in (1, 2))
    until(lambda: all(list_runs(space, ada)[run]["in_use"] for run in (first, second)))  # both win
    for run, client in ((first, ada), (second, space.signed_in("wendy"))):
        assert client.call(space.number(DOWNLOAD), event_data={"run": run}).success
        for action in ("rename", "revert", "delete"):
            outcome = act(space, client, run, action)
            assert outcome.success, (action, outcome)
        assert run not in list_runs(space, ada)


def test_a_tuned_model_is_offered_to_its_owner_only(
    space: SpaceServer, attackers: dict[str, PageClient], ada: PageClient, finished_run: str
) -> None:
    number = space.number(RUN)

    def compare(client: PageClient) -> Outcome:
        photo = client.upload("photo.jpg", PHOTO.read_bytes())
        return client.call(number, client.inputs(number, photo=photo, models=[_tuned_model(ada, finished_run)], n=1))

    for kind in ("own cookie", "signed in"):
        outcome = compare(attackers[kind])
        assert not outcome.success and outcome.error, outcome
        assert finished_run not in json.dumps(_picker(space, attackers[kind]))
    assert finished_run in json.dumps(_picker(space, ada))


def _tuned_model(client: PageClient, run: str) -> str:
    from training.runs.adapters import model_name

    return model_name(run)


def _picker(space: SpaceServer, client: PageClient) -> Any:
    """Return what the page shows when it opens, which contains the model picker's choices."""
    return client.call(space.number("ui.playground.tab.page_opened")).data


def test_guests_cannot_train(space: SpaceServer, attackers: dict[str, PageClient]) -> None:
    """GUEST_RUNS is off in a Space by default."""
    before = list_runs(space, attackers["own cookie"])
    for kind in ("own cookie", "page secret", "nothing"):
        client, number = attackers[kind], space.number(RETRAIN)
        assert not client.call(number, client.default_inputs(number)).success
        endpoint = space.number("ui.api.runs.retrain_requested")
        outcome = client.call(endpoint, [{"sharpness": 1}, "moondream-tiny", "bundled", 5, 1, "by a guest"])
        assert not outcome.success and outcome.error, outcome
    assert list_runs(space, attackers["own cookie"]) == before


# ── Budgets and usage ───────────────────────────────────────────────────────────────────────────────────────────────


def test_only_administrators_see_usage_and_change_budgets(space: SpaceServer, attackers: dict[str, PageClient]) -> None:
    admin, number = space.signed_in("acme"), space.number("ui.usage.tab.budget_submitted")

    def dashboard(client: PageClient) -> dict[str, Any]:
        for handler, name in space.handlers.items():
            if name == "ui.events.handler":  # one for each tab that refreshes only while it is selected
                assert client.call(handler, [], {"index": 0, "value": "Usage"}).success
        snapshot: dict[str, Any] = client.call(space.number("ui.usage.tab.refreshed_if_open")).data[0]
        return snapshot

    def budgets() -> str:
        return json.dumps(dashboard(admin)["budgets"])

    assert admin.call(number, [], {"branch": "attacked", "limit": 7, "stop": True}).success
    before = budgets()
    assert "attacked" in before
    for kind, attacker in attackers.items():
        for event_data in ({"action": "remove", "branch": "attacked"}, {"branch": "attacked", "limit": 999_999}):
            assert attacker.call(number, [], event_data).refused, kind
            assert attacker.call(number, [], event_data, admin.session_hash).refused, kind
        shown = dashboard(attacker)
        assert shown["error"] and "budgets" not in shown and "attacked" not in json.dumps(shown), kind
        assert attacker.call(space.number("ui.api.usage.metrics"), [{}]).refused, kind
        for path in ("/metrics", "/v1/usage", "/v1/usage.csv", "/v1/usage.parquet"):
            assert attacker.request("GET", path).status_code == 401, (kind, path)
    assert budgets() == before
    assert admin.call(number, [], {"action": "remove", "branch": "attacked"}).success
    assert "attacked" not in budgets()


# ── Other sites ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "foreign",
    [
        {"origin": "https://evil.example", "sec-fetch-site": "cross-site"},
        {"origin": "null", "sec-fetch-site": "cross-site"},
        {"origin": "https://evil-playground.hf.space", "sec-fetch-site": "cross-site"},
    ],
)
def test_another_sites_page_in_the_browser_of_an_administrator(space: SpaceServer, foreign: dict[str, str]) -> None:
    """The browser sends the administrator's cookies along; the server refuses."""
    admin = space.signed_in("acme")
    number = space.number("ui.usage.tab.budget_submitted")
    body = {"fn_index": number, "data": [], "event_data": {"branch": "csrf", "limit": 1}, "session_hash": "x"}
    requests: list[tuple[str, dict[str, Any]]] = [
        ("/gradio_api/queue/join", {"json": body}),
        ("/gradio_api/queue/join", {"content": json.dumps(body), "headers": {"content-type": "text/plain"}}),
        ("/gradio_api/run/predict", {"json": body}),
        ("/gradio_api/call/retrain", {"json": {"data": [{"sharpness": 1}]}}),
        ("/gradio_api/upload", {"files": {"files": ("x.jpg", b"x")}}),
        ("/v1/query", {"json": {}}),
        ("/v1/tuning/finetunes", {"json": {}}),
    ]
    for path, options in requests:
        headers = foreign | options.pop("headers", {})
        response = admin.request("POST", path, headers=headers, **options)
        assert response.status_code == 403 and FOREIGN_ORIGIN in response.text, path
    assert admin.request("POST", "/admin?token=x", headers=foreign).status_code == 404
    assert admin.request("GET", "/metrics", headers=foreign).status_code == 401
    assert admin.request("GET", "/metrics").status_code == 200
    page = admin.request("GET", "/", headers=foreign)
    assert "acme" not in page.text.replace(space.host, "").replace("acme/playground", "")


def test_another_site_cannot_read_the_messages_of_a_session(space: SpaceServer) -> None:
    """An image or script element sends cookies without an Origin header."""
    client = space.guest()
    start_comparison(space, client, "slow", count=1)
    headers = {"origin": "", "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    headers = {name: value for name, value in (client.headers() | headers).items() if name != "origin"}
    text = read_stream(client, f"/gradio_api/queue/data?session_hash={client.session_hash}", headers)
    assert text.count("data: ") == 1 and "unexpected_error" in text
    assert finish(client)[0] == "done"


# ── Secrets ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_table_export_log_metric_or_page_contains_a_secret(
    space: SpaceServer, victim: Victim, ada: PageClient, finished_run: str
) -> None:
    """Session hashes, cookies, page secrets, keys and tokens: of all visitors of this file, and of the deployment."""
    admin = space.signed_in("acme")
    until(lambda: ",one," in admin.request("GET", "/v1/usage.csv?period=day").text)  # the victim's, after a while
    clients = (victim.client, ada, admin)
    secrets = [client.session_hash for client in clients]
    secrets += [client.page_secret for client in clients]
    secrets += [value for client in clients for value in client.cookies.values()]
    secrets += [API_KEY, METRICS_TOKEN, "simulated-client-secret", "hf_oauth_"]
    texts = {
        path: admin.request("GET", path).content
        for path in ("/", "/config", "/metrics", "/v1/usage", "/v1/usage.csv", "/v1/usage.parquet", "/openapi.json")
    }
    texts |= {str(path): path.read_bytes() for path in space.folder.rglob("*") if path.is_file()}
    texts["log"] = space.log.read_bytes()
    assert any(name.endswith(".sqlite3") for name in texts)
    found = [(name, secret[:6]) for name, text in texts.items() for secret in secrets if secret.encode() in text]
    assert found == []


def test_errors_contain_no_secret(space: SpaceServer) -> None:
    client = space.guest()
    client.cookies["playground_admin"] = "not-a-real-admin-cookie-0000000000"
    responses = [
        client.navigate("/admin?token=wrong-token-of-the-tests"),
        client.request("POST", "/gradio_api/queue/join", json={"session_hash": client.session_hash, "fn_index": 9999}),
        client.request("GET", "/v1/models", headers={"authorization": "Bearer wrong-key-of-the-tests"}),
    ]
    log = space.log.read_text(errors="replace")
    for secret in (client.session_hash, client.page_secret, *client.cookies.values(), "wrong-token", "wrong-key"):
        assert secret not in log
        assert not any(secret in response.text for response in responses)


# ── The API without keys ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("settings", [{"host": "0.0.0.0"}, {"behind_proxy": True}])
def test_without_keys_the_api_is_closed_where_a_proxy_may_be_in_front(tmp_path: Path, settings: dict[str, Any]) -> None:
    """A reverse proxy on this machine passes requests of others on from a loopback address, often with its Host."""
    with app_server(tmp_path, **settings) as address:
        assert httpx.get(f"{address}/v1/models").status_code == 401
        assert httpx.post(f"{address}/v1/query", json={}).status_code == 401
        assert httpx.get(f"{address}/metrics").status_code == 401


def test_without_keys_the_api_is_open_on_localhost(tmp_path: Path) -> None:
    with app_server(tmp_path) as address:
        assert httpx.get(f"{address}/v1/models").status_code == 200
        assert httpx.get(f"{address}/metrics").status_code == 200
        assert httpx.get(f"{address}/v1/models", headers={"host": "evil.example"}).status_code == 401


# ── Files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "path",
    [
        "http://169.254.169.254/latest/meta-data",
        "https://example.com/",
        "HTTP://example.com/",
        "{data}/playground.sqlite3",
        "{data}/../log",
        "/etc/passwd",
        "app.py",
    ],
)
@pytest.mark.parametrize("route", ["file=", "file/"])
def test_the_file_route_serves_neither_other_sites_nor_other_files(space: SpaceServer, path: str, route: str) -> None:
    response = space.guest().request("GET", f"/gradio_api/{route}{path.format(data=space.folder)}")
    assert response.status_code in (403, 404)
    if path.startswith("http"):
        assert response.status_code == 404  # refused before Gradio, which would fetch it
