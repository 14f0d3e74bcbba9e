"""The matrix test: every handler of the page and every route of the server, called as every kind of visitor.

What is allowed follows from `HANDLERS` and `ROUTES`; a handler or route that these tables do not list fails.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest

import app
from access.control import AccessControl
from access.middleware import FOREIGN_ORIGIN, NOT_FOUND, USAGE_ONLY
from access.permissions import (
    ADMIN_ONLY,
    HANDLERS,
    NO_SESSION,
    ROUTES,
    SIGN_IN,
    HandlerRule,
    RouteAccess,
    _example,
    find_route,
    unlisted_routes,
)
from access.roles import Role
from settings import Settings
from tests.support.app_server import app_server
from tests.support.page_client import TIMEOUT_SECONDS, Outcome, PageClient
from tests.support.runs import FAKE
from tests.support.server_routes import SPACE_HANDLERS, handler_names, walk_routes
from tests.support.space_server import API_KEY, METRICS_TOKEN, SpaceServer
from ui.permissions import protect
from ui.services import AppServices
from ui.usage import tab as usage_tab

pytestmark = pytest.mark.slow
ROLES = {
    "stranger": Role.GUEST,  # without cookie and page secret
    "guest": Role.GUEST,
    "framed guest": Role.GUEST,  # whose browser blocks cookies
    "user": Role.USER,
    "other user": Role.USER,
    "admin": Role.ADMIN,
}
VISITORS = list(ROLES)
EVENT_DATA = {"index": 0, "value": "Usage"}
REFUSALS = (NOT_FOUND, FOREIGN_ORIGIN, USAGE_ONLY)


def make_visitors(space: SpaceServer) -> dict[str, PageClient]:
    """Open the page as every kind of visitor."""
    return {
        "stranger": PageClient(space.address, space.host, block_cookies=True, page_secret=False),
        "guest": space.guest(),
        "framed guest": PageClient(space.address, space.host, block_cookies=True),
        "user": space.signed_in("ada"),
        "other user": space.signed_in("bob"),
        "admin": space.signed_in("acme"),
    }


@pytest.fixture(scope="module")
def visitors(space: SpaceServer) -> dict[str, PageClient]:
    return make_visitors(space)


def expected_refusal(rule: HandlerRule, visitor: str) -> str:
    """Return the message with which a handler refuses a visitor; "" if it works."""
    if ROLES[visitor] < rule.role:
        return ADMIN_ONLY if rule.role == Role.ADMIN else SIGN_IN
    return NO_SESSION if rule.session and visitor == "stranger" else ""


def check(outcome: Outcome, expected: str, where: object) -> None:
    """Assert that a call was refused as expected, or reached the handler: it returned or raised a readable error."""
    if expected:
        assert outcome.refused and outcome.error == expected, (where, outcome)
    else:
        assert outcome.reached and not outcome.refused, (where, outcome)


# ── Handlers ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_handler_of_the_page_is_listed(space: SpaceServer, visitors: dict[str, PageClient]) -> None:
    config = visitors["guest"].config()["dependencies"]
    numbers = {dependency["id"] for dependency in config if dependency["backend_fn"]}
    assert numbers == set(space.handlers)
    assert set(space.handlers.values()) - set(HANDLERS) == set()
    assert SPACE_HANDLERS - set(space.handlers.values()) == set()


@pytest.mark.parametrize("visitor", VISITORS)
def test_handlers_through_the_queue(space: SpaceServer, visitors: dict[str, PageClient], visitor: str) -> None:
    client = visitors[visitor]
    numbers = list(space.handlers)
    for start in range(0, len(numbers), 16):  # the queue is bounded
        batch = numbers[start : start + 16]
        outcomes = client.call_all([(number, client.default_inputs(number), EVENT_DATA) for number in batch])
        for number, outcome in zip(batch, outcomes, strict=True):
            name = space.handlers[number]
            check(outcome, expected_refusal(HANDLERS[name], visitor), (visitor, number, name))


@pytest.mark.parametrize("visitor", VISITORS)
def test_handlers_by_direct_calls(space: SpaceServer, visitors: dict[str, PageClient], visitor: str) -> None:
    """POST /run calls handlers by number as well; Gradio refuses this for queued handlers in a Space."""
    client = visitors[visitor]
    direct = {item["id"] for item in client.config()["dependencies"] if item["backend_fn"] and item["queue"] is False}
    assert len(direct) > 10
    for number in direct:
        outcome = client.run(number, client.default_inputs(number), EVENT_DATA)
        name = space.handlers[number]
        check(outcome, expected_refusal(HANDLERS[name], visitor), (visitor, number, name))
    queued = space.number("ui.usage.tab.budget_submitted")
    assert not client.run(queued, [], EVENT_DATA).reached


@pytest.mark.parametrize("visitor", ["stranger", "guest", "user", "admin"])
@pytest.mark.parametrize("version", ["", "v2/"])
def test_named_endpoints(space: SpaceServer, visitors: dict[str, PageClient], visitor: str, version: str) -> None:
    client = visitors[visitor]
    info = client.request("GET", "/gradio_api/info").json()["named_endpoints"]
    numbers = {
        dependency["api_name"]: dependency["id"]
        for dependency in client.config()["dependencies"]
        if dependency["backend_fn"] and f"/{dependency['api_name']}" in info
    }
    assert len(numbers) == len(info)
    for name, number in numbers.items():
        rule = HANDLERS[space.handlers[number]]
        inputs = client.default_inputs(number)
        names = [parameter["parameter_name"] for parameter in info[f"/{name}"]["parameters"]]
        body = dict(zip(names, inputs, strict=True)) if version else {"data": inputs}
        joined = client.request("POST", f"/gradio_api/call/{version}{name}", json=body)
        assert joined.status_code == 200, (name, joined.text)
        response = client.request("GET", f"/gradio_api/call/{version}{name}/{joined.json()['event_id']}")
        expected = expected_refusal(rule, visitor)
        assert ('"title": "Not allowed"' in response.text) == bool(expected), (visitor, name, response.text)
        assert expected in html.unescape(response.text)


def test_endpoints_with_an_api_key(space: SpaceServer) -> None:
    """A program with a key has the rights of a user."""
    client = PageClient(space.address, space.host, block_cookies=True, page_secret=False)
    key = {"authorization": f"Bearer {API_KEY}"}
    ask = client.headers
    client.headers = lambda headers=None: ask(headers) | key
    for name, role in ((name, rule.role) for name, rule in HANDLERS.items() if name.startswith("ui.api.")):
        number = space.number(name)
        assert client.call(number, event_data=EVENT_DATA).refused == (role > Role.USER), name


@pytest.mark.parametrize(
    ("account", "role"),
    [("acme", "admin"), ("grace", "admin"), ("wendy", "admin"), ("rita", "user"), ("ada", "user")],
)
def test_roles_after_signing_in(space: SpaceServer, account: str, role: str) -> None:
    """The owner, PLAYGROUND_ADMINS and members of the owning organization with write access are administrators."""
    number = space.number("ui.account.show_account")
    client = space.signed_in(account)
    [html] = client.call(number).data
    assert f'data-role="{role}"' in html and account in html
    assert client.request("GET", "/metrics").status_code == (200 if role == "admin" else 401)
    client.navigate("/logout")
    [html] = client.call(number).data
    assert 'data-role="guest"' in html
    assert client.request("GET", "/metrics").status_code == 401


def test_a_forged_session_cookie_is_a_guests(space: SpaceServer) -> None:
    client, admin = space.guest(), space.signed_in("acme")
    number = space.number("ui.account.show_account")
    content, _, signature = admin.cookies["session"].partition(".")
    for forged in (f"{content}.{signature[:-4]}AAAA", f"{content}", f"{content}."):
        client.cookies["session"] = forged
        assert 'data-role="guest"' in client.call(number).data[0]


# ── Routes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_route_of_the_server_is_listed(space: SpaceServer) -> None:
    assert len(space.routes) > 100
    assert unlisted_routes(iter(space.routes)) == []


def test_every_listed_route_exists(space: SpaceServer) -> None:
    patterns = [(method, re.compile(_as_pattern(path))) for method, path in space.routes]
    for rule in ROUTES:
        example = _example(rule.path)
        exists = any(method in rule.methods and pattern.fullmatch(example) for method, pattern in patterns)
        assert exists or rule.path in ("/admin", "/v1", "/v1/{path:path}", "/gradio_api/stream/{path:path}"), rule
    # The middleware answers /admin; the others stand for several routes.
    for prefix in ("/v1/", "/gradio_api/stream/"):
        assert any(path.startswith(prefix) for _, path in space.routes)


def _as_pattern(path: str) -> str:
    """Return a regular expression of a route's path, in which parameters match anything."""
    return "".join(".*" if part.startswith("{") else re.escape(part) for part in re.split(r"(\{[^}]*\})", path))


@pytest.mark.parametrize("visitor", VISITORS)
def test_routes(space: SpaceServer, visitors: dict[str, PageClient], visitor: str) -> None:
    client = visitors[visitor]
    cookies = dict(client.cookies)
    for method, path in space.routes:
        rule = find_route(method, _example(path))
        assert rule is not None, (method, path)
        status, text = _request(client, method, _example(path))
        client.cookies = dict(cookies)  # /logout
        where = (visitor, method, path, status, text[:300])
        if rule.access == RouteAccess.CLOSED:
            assert status == 404 and (NOT_FOUND in text or method == "HEAD"), where
        elif rule.access == RouteAccess.USAGE:
            assert (status == 401) == (ROLES[visitor] < Role.ADMIN), where
        elif rule.access == RouteAccess.API_KEY:
            assert status == 401 or "/openapi.json" in path, where
        else:
            assert status != 401 and not any(refusal in text for refusal in REFUSALS), where


def test_the_v1_api_with_a_key(space: SpaceServer) -> None:
    key = {"authorization": f"Bearer {API_KEY}"}
    for method, path in space.routes:
        rule = find_route(method, _example(path))
        if rule and rule.access in (RouteAccess.API_KEY, RouteAccess.USAGE):
            if "/finetunes" in path:
                continue  # loads torch
            headers = {**key, "host": space.host}
            response = httpx.request(method, space.address + _example(path), headers=headers, timeout=TIMEOUT_SECONDS)
            assert response.status_code not in (401, 403), (method, path, response.text)


def test_the_metrics_token_reads_usage_only(space: SpaceServer) -> None:
    token = {"authorization": f"Bearer {METRICS_TOKEN}", "host": space.host}
    for method, path in space.routes:
        rule = find_route(method, _example(path))
        if rule and rule.access in (RouteAccess.API_KEY, RouteAccess.USAGE) and "/openapi.json" not in path:
            response = httpx.request(method, space.address + _example(path), headers=token, timeout=TIMEOUT_SECONDS)
            assert (response.status_code == 401) == (rule.access == RouteAccess.API_KEY), (method, path)


def _request(client: PageClient, method: str, path: str) -> tuple[int, str]:
    """Send a request with an empty body; streams are left after their first bytes."""
    options: dict[str, Any] = {"json": {}} if method not in ("GET", "HEAD") else {}
    query = "?session_hash=x" if method == "GET" else ""
    client.http.headers["connection"] = "close"  # the server closes the connection after an exception
    with client.stream(method, path + query, **options) as response:
        if "text/event-stream" in response.headers.get("content-type", ""):
            return response.status_code, ""
        return response.status_code, response.read().decode(errors="replace")


# ── Listening on another address ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, AppServices]]:
    """Address and services of an application that listens on all addresses."""
    folder = tmp_path_factory.mktemp("link")
    services = app.build_services(Settings(data_dir=folder, host="0.0.0.0"), FAKE)
    with pytest.MonkeyPatch.context() as patch, app_server(folder, services=services, host="0.0.0.0") as address:
        patch.setattr(usage_tab, "SAMPLE_SKILLS", ())
        yield address, services


def test_an_administrator_opens_the_link(linked: tuple[str, AppServices], capsys: pytest.CaptureFixture[str]) -> None:
    address, access = linked[0], linked[1].access
    token = access.link.token
    admin, guest = PageClient(address), PageClient(address)
    for client in (admin, guest):
        client.open()
        assert client.request("GET", "/metrics").status_code == 401
    assert guest.navigate("/admin?token=wrong").status_code == 403
    response = admin.navigate(f"/admin?token={token}")
    assert (response.status_code, response.headers["location"]) == (303, "/")
    assert guest.navigate(f"/admin?token={token}").status_code == 403
    output = capsys.readouterr().out
    assert f"/admin?token={access.link.token}" in output and token not in output
    assert admin.request("GET", "/metrics").status_code == 200
    assert guest.request("GET", "/metrics").status_code == 401
    budget = next(
        dependency["id"]
        for dependency in admin.config()["dependencies"]
        if dependency["backend_fn"] and dependency["targets"][0][1] == "budget"
    )
    assert admin.call(budget, [], {"branch": "main", "limit": "x"}).title == "Budget"
    assert guest.call(budget, [], {"branch": "main", "limit": "x"}).error == ADMIN_ONLY


def test_handlers_by_direct_calls_outside_a_space(linked: tuple[str, AppServices]) -> None:
    """Here Gradio accepts direct calls of queued handlers as well."""
    address, services = linked
    admin = PageClient(address)
    admin.navigate(f"/admin?token={services.access.link.token}")
    stranger = PageClient(address, block_cookies=True, page_secret=False)
    clients = {"stranger": stranger, "guest": PageClient(address), "admin": admin}
    for number, name in handler_names(app.build_page(services)).items():
        for visitor, client in clients.items():
            outcome = client.run(number, client.default_inputs(number), EVENT_DATA)
            check(outcome, expected_refusal(HANDLERS[name], visitor), (visitor, number, name))


def test_every_route_of_the_mounted_page_is_listed(tmp_path: Path) -> None:
    application = app.create_app(Settings(data_dir=tmp_path, host="0.0.0.0"))
    assert unlisted_routes(walk_routes(application.routes)) == []


# ── The matrix itself ───────────────────────────────────────────────────────────────────────────────────────────────


def test_an_unlisted_handler_prevents_the_page_from_being_built() -> None:
    def unlisted() -> None:
        """Do nothing."""

    with gr.Blocks() as page:
        gr.Button().click(unlisted)
    with pytest.raises(KeyError, match="unlisted"):
        protect(page, AccessControl())


def test_an_unlisted_route_is_noticed(tmp_path: Path) -> None:
    application = app.create_app(Settings(data_dir=tmp_path, host="0.0.0.0"))
    application.add_api_route("/new/{number}", lambda number: number, methods=["POST"])
    assert unlisted_routes(walk_routes(application.routes)) == ["POST /new/{number}"]


def test_the_first_rule_counts() -> None:
    """A rule that an earlier one hides would describe a permission that does not exist."""
    for rule in ROUTES:
        for method in rule.methods:
            found = find_route(method, _example(rule.path))
            assert found == rule, (method, rule.path)
