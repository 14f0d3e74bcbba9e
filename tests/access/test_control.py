"""Tests of the visitor that a request is attributed to, per mode, and of the secrets that bind sessions to browsers."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import pytest
from starlette.requests import HTTPConnection

from access.control import (
    ADMIN_COOKIE,
    SESSION_COOKIE,
    SESSION_HEADER,
    AccessControl,
    AdminLink,
    bind_session,
    browser_secret,
    is_same_origin,
)
from access.roles import Role, Visitor

SECRET, OTHER_SECRET = "s" * 43, "t" * 43
SPACE = "Acme/playground"


def request(
    headers: dict[str, str] | None = None,
    client: str = "127.0.0.1",
    session: dict[str, Any] | None = None,
    cookies: dict[str, str] | None = None,
) -> HTTPConnection:
    """Create a request, by default from a browser on this machine."""
    headers = {"host": "localhost:7860", **(headers or {})}
    if cookies:
        headers["cookie"] = "; ".join(f"{name}={value}" for name, value in cookies.items())
    scope: dict[str, Any] = {
        "type": "http",
        "client": (client, 50000),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    return HTTPConnection(scope if session is None else {**scope, "session": session})


def signed_in(name: str = "ada", orgs: Any = (), sub: str = "1", expires_in: float = 3600) -> dict[str, Any]:
    """Return the content of Gradio's signed session cookie after "Sign in with Hugging Face"."""
    user = {"sub": sub, "preferred_username": name, "name": "Ada L.", "orgs": list(orgs)}
    return {"oauth_info": {"expires_at": time.time() + expires_in, "userinfo": user}}


def organization(role: str, name: str = "acme") -> dict[str, str]:
    return {"sub": "9", "preferred_username": name, "name": "Some display name", "roleInOrg": role}


# ── On this machine ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("client", ["127.0.0.1", "::1", "127.8.8.8"])
@pytest.mark.parametrize("host", ["localhost", "localhost:7860", "127.0.0.1:7860", "[::1]:7860"])
def test_the_person_at_the_machine_is_admin(client: str, host: str) -> None:
    visitor = AccessControl().visitor(request({"host": host, "origin": f"http://{host}"}, client))
    assert (visitor.role, visitor.id) == (Role.ADMIN, "")


@pytest.mark.parametrize(
    ("headers", "client"),
    [
        ({}, "192.168.1.7"),
        ({}, "10.0.0.1"),
        ({}, "testclient"),
        ({"host": "evil.example"}, "127.0.0.1"),  # DNS rebinding
        ({"host": "localhost.evil.example:7860"}, "127.0.0.1"),
        ({"host": ""}, "127.0.0.1"),
        ({"origin": "https://evil.example"}, "127.0.0.1"),
        ({"origin": "http://localhost.evil.example"}, "127.0.0.1"),
        ({"origin": "null"}, "127.0.0.1"),  # a sandboxed frame or a file
    ],
)
def test_everyone_else_is_a_guest_on_a_local_deployment(headers: dict[str, str], client: str) -> None:
    assert AccessControl().visitor(request(headers, client)).role == Role.GUEST


@pytest.mark.parametrize("mode", ["link", "space"])
def test_a_request_from_this_machine_is_a_guests_where_a_proxy_may_have_sent_it(mode: Any) -> None:
    assert AccessControl(mode).visitor(request()).role == Role.GUEST


# ── Administrator link ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_link_works_once_and_is_replaced() -> None:
    link = AdminLink()
    first = link.token
    cookie = link.redeem(first)
    assert cookie is not None and link.accepts(cookie)
    assert link.redeem(first) is None
    assert link.token != first
    second = link.redeem(link.token)
    assert second is not None and second != cookie
    assert link.accepts(cookie) and link.accepts(second)


@pytest.mark.parametrize("token", ["", "x", "é" * 43])
def test_a_wrong_token_is_refused_and_does_not_use_up_the_link(token: str) -> None:
    link = AdminLink()
    right = link.token
    assert link.redeem(token) is None
    assert link.token == right
    assert link.redeem(right) is not None


@pytest.mark.parametrize("cookie", ["", "x", SECRET])
def test_a_cookie_that_the_link_did_not_give_out_is_a_guests(cookie: str) -> None:
    access = AccessControl("link")
    assert access.visitor(request(cookies={ADMIN_COOKIE: cookie})).role == Role.GUEST
    assert access.visitor(request(cookies={ADMIN_COOKIE: access.link.token})).role == Role.GUEST


def test_the_browser_that_opened_the_link_is_admin() -> None:
    access = AccessControl("link")
    cookie = access.link.redeem(access.link.token) or ""
    visitor = access.visitor(request(client="10.0.0.1", cookies={ADMIN_COOKIE: cookie}))
    assert (visitor.role, visitor.id) == (Role.ADMIN, "")
    foreign = request({"origin": "https://evil.example"}, cookies={ADMIN_COOKIE: cookie})
    assert access.visitor(foreign).role == Role.GUEST


def test_the_repr_has_no_token() -> None:
    link = AdminLink()
    cookie = link.redeem(link.token) or ""
    assert link.token not in repr(link)
    assert cookie not in repr(link) and hashlib.sha256(cookie.encode()).hexdigest() not in repr(link)


# ── Space ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("session", "role"),
    [
        ({}, Role.GUEST),
        ({"oauth_info": None}, Role.GUEST),
        (signed_in(), Role.USER),
        (signed_in(expires_in=-1), Role.GUEST),
        (signed_in("acme", expires_in=-1), Role.GUEST),
        (signed_in("acme"), Role.ADMIN),
        (signed_in("ACME"), Role.ADMIN),
        (signed_in("acme2"), Role.USER),
        (signed_in("grace"), Role.ADMIN),  # in PLAYGROUND_ADMINS
        (signed_in(sub=""), Role.GUEST),
        (signed_in(""), Role.GUEST),
        (signed_in(orgs=[organization("admin")]), Role.ADMIN),
        (signed_in(orgs=[organization("write")]), Role.ADMIN),
        (signed_in(orgs=[organization("contributor")]), Role.USER),
        (signed_in(orgs=[organization("read")]), Role.USER),
        (signed_in(orgs=[organization("")]), Role.USER),
        (signed_in(orgs=[{"preferred_username": "acme"}]), Role.USER),
        (signed_in(orgs=[organization("admin", "acme-fans")]), Role.USER),
        (signed_in(orgs=[organization("read"), organization("admin", "others")]), Role.USER),
        (signed_in(orgs=[{"preferred_username": "", "name": "Acme", "roleInOrg": "admin"}]), Role.USER),
        (signed_in(orgs=[{"name": "Acme", "roleInOrg": "admin"}]), Role.USER),  # anyone may choose a display name
        (signed_in(orgs=["acme", None]), Role.USER),
    ],
)
def test_roles_in_a_space(session: dict[str, Any], role: Role) -> None:
    access = AccessControl("space", space=SPACE, admins=["Grace"])
    assert access.visitor(request({"host": "acme-playground.hf.space"}, "10.1.1.1", session)).role == role


def test_a_users_id_is_the_account_and_not_the_name() -> None:
    access = AccessControl("space", space=SPACE)
    before, after = (access.visitor(request(session=signed_in(name))) for name in ("ada", "renamed"))
    assert before.id == after.id == "hf:1"
    assert (before.name, after.name) == ("ada", "renamed")


@pytest.mark.parametrize("mode", ["local", "link"])
def test_a_session_cookie_means_nothing_outside_a_space(mode: Any) -> None:
    access = AccessControl(mode, space=SPACE)
    assert access.visitor(request({}, "10.1.1.1", signed_in("acme"))).role == Role.GUEST


def test_a_space_without_a_name_has_no_owner() -> None:
    access = AccessControl("space")
    assert access.visitor(request(session=signed_in(orgs=[organization("admin", "")]))).role == Role.USER


def test_another_sites_page_does_not_act_as_the_signed_in_user() -> None:
    access = AccessControl("space", space=SPACE)
    headers = {"host": "acme-playground.hf.space", "origin": "https://evil.example"}
    assert access.visitor(request(headers, session=signed_in("acme"))) == Visitor()


# ── API keys ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ["link", "space"])
def test_an_api_key_is_a_user(mode: Any) -> None:
    access = AccessControl(mode, tenant_of=lambda connection: connection.headers.get("authorization"))
    visitor = access.visitor(request({"authorization": "abc"}))
    assert (visitor.role, visitor.id) == (Role.USER, "key:abc")
    assert access.visitor(request()).role == Role.GUEST


# ── Secrets and sessions ────────────────────────────────────────────────────────────────────────────────────────────


def test_guests_are_told_apart_by_a_salted_hash() -> None:
    access = AccessControl("link")
    first, second = (access.visitor(request(cookies={SESSION_COOKIE: secret})) for secret in (SECRET, OTHER_SECRET))
    assert first.id == f"guest:{first.hash}" and first.hash
    assert first.id != second.id
    assert SECRET not in repr(first) and hashlib.sha256(SECRET.encode()).hexdigest()[:24] != first.hash
    assert AccessControl("link").visitor(request(cookies={SESSION_COOKIE: SECRET})).hash != first.hash


def test_a_guest_without_a_secret_owns_nothing() -> None:
    guest = AccessControl("link").visitor(request())
    assert guest.id == "guest:" and not guest.may_change("guest:") and not guest.may_change("")


@pytest.mark.parametrize(
    ("cookies", "header", "secret"),
    [
        ({SESSION_COOKIE: SECRET}, "", SECRET),
        ({}, OTHER_SECRET, OTHER_SECRET),
        ({SESSION_COOKIE: SECRET}, OTHER_SECRET, SECRET),
        ({SESSION_COOKIE: "short"}, "", ""),
        ({SESSION_COOKIE: "x" * 129}, "", ""),
        ({SESSION_COOKIE: "short"}, OTHER_SECRET, OTHER_SECRET),
        ({}, "short", ""),
        ({}, "", ""),
    ],
)
def test_the_secret_is_the_cookie_or_the_pages_header(cookies: dict[str, str], header: str, secret: str) -> None:
    assert browser_secret(request({SESSION_HEADER: header}, cookies=cookies)) == secret


def test_requests_of_other_sites_have_no_secret() -> None:
    headers = {"origin": "https://evil.example", SESSION_HEADER: OTHER_SECRET}
    assert browser_secret(request(headers, cookies={SESSION_COOKIE: SECRET})) == ""


@pytest.mark.parametrize(
    ("headers", "same"),
    [
        ({}, True),  # not a browser
        ({"origin": "http://localhost:7860"}, True),
        ({"origin": "http://localhost:7861"}, False),
        ({"origin": "http://evil.example"}, False),
        ({"origin": "null"}, False),
        ({"origin": ""}, False),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, True),  # a link on another site
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, False),  # an image on another site
        ({"sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "origin": "null"}, False),  # a form
        ({"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}, True),
        ({"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"}, False),  # another port or subdomain
        ({"sec-fetch-site": "none", "sec-fetch-mode": "navigate"}, True),  # the address bar
    ],
)
def test_same_origin(headers: dict[str, str], same: bool) -> None:
    assert is_same_origin(request(headers)) == same


def test_a_bound_session_depends_on_both_parts() -> None:
    bound = bind_session(SECRET, "abc")
    assert bound == bind_session(SECRET, "abc")
    assert len({bound, bind_session(OTHER_SECRET, "abc"), bind_session(SECRET, "abd"), bind_session("", "abc")}) == 4
    assert "abc" not in bound and SECRET not in bound
