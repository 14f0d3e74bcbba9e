"""Access control: determines the visitor who sends a request."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from starlette.requests import HTTPConnection

from access.local import is_local
from access.roles import LOCAL_ADMIN, Role, Visitor

SESSION_COOKIE = "playground_session"  # a random secret per browser, readable by the server only
ADMIN_COOKIE = "playground_admin"
SESSION_HEADER = "x-playground-session"  # the secret of a page whose browser blocks cookies
SECRET_LENGTH = range(32, 129)
WRITE_ROLES = ("admin", "write")  # roles in a Hugging Face organization that may change its Spaces
Mode = Literal["local", "link", "space"]


@dataclass
class AdminLink:
    """A one-time token that makes a browser an administrator's, and the browsers that used one."""

    token: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    _browsers: set[str] = field(default_factory=set, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def redeem(self, token: str) -> str | None:
        """Exchange the token for a cookie's value and replace the token; None if the token is wrong."""
        with self._lock:
            if not hmac.compare_digest(token.encode(), self.token.encode()):
                return None
            cookie, self.token = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
            self._browsers.add(_digest(cookie))
        return cookie

    def accepts(self, cookie: str) -> bool:
        """Whether a cookie's value was given out by `redeem`."""
        return bool(cookie) and _digest(cookie) in self._browsers


class AccessControl:
    """Determines the visitor who sends a request.

    - `local`: the server listens on this machine only. Requests from this machine are the administrator's.
    - `link`: the server listens on another address. The administrator opens a one-time link.
    - `space`: a Hugging Face Space. Visitors sign in with Hugging Face; its owner, members of the owning organization
      with write access and the listed administrators are administrators. Without OAuth, the link is used.
    """

    def __init__(
        self,
        mode: Mode = "local",
        *,
        space: str = "",
        admins: Sequence[str] = (),
        guest_runs: bool = False,
        hash_secret: Callable[[str], str] | None = None,
        tenant_of: Callable[[HTTPConnection], str | None] | None = None,
    ) -> None:
        """Create the access control.

        Args:
            mode: How administrators are recognized; see the class.
            space: The Space as owner/name, in mode `space`.
            admins: User names on Hugging Face of further administrators.
            guest_runs: Whether guests may start short training runs on this machine.
            hash_secret: Returns a salted hash of a browser's secret. The default uses a salt of this process.
            tenant_of: Returns a short name of the request's API key, or None without a valid key.
        """
        self.mode: Mode = mode
        self.guest_runs = guest_runs
        self.owner = space.partition("/")[0].lower()
        self.admins = frozenset(name.lower() for name in admins)
        self.link = AdminLink()
        salt = secrets.token_bytes(32)
        self._hash_secret = hash_secret or (lambda secret: hmac.new(salt, secret.encode(), "sha256").hexdigest()[:24])
        self._tenant_of = tenant_of or (lambda connection: None)

    def visitor(self, connection: HTTPConnection) -> Visitor:
        """Return the visitor who sends a request.

        Cookies of a request that another site's page sends are ignored.
        """
        secret = browser_secret(connection)
        hashed = self._hash_secret(secret) if secret else ""
        if self.mode == "local" and is_local(connection):
            return Visitor(LOCAL_ADMIN.role, LOCAL_ADMIN.id, LOCAL_ADMIN.name, hashed)
        if not is_same_origin(connection):
            return Visitor()
        if self.link.accepts(connection.cookies.get(ADMIN_COOKIE, "")):
            return Visitor(Role.ADMIN, "", "Administrator", hashed)
        account = self._account(connection.scope.get("session") or {})
        if account is not None:
            user_info, role = account
            return Visitor(role, f"hf:{user_info['sub']}", str(user_info["preferred_username"]), hashed)
        tenant = self._tenant_of(connection)
        if tenant:
            return Visitor(Role.USER, f"key:{tenant}", "API key", hashed)
        return Visitor(Role.GUEST, f"guest:{hashed}", "", hashed)

    def _account(self, session: Mapping[str, Any]) -> tuple[Mapping[str, Any], Role] | None:
        """Return the Hugging Face account in a signed session cookie and its role; None if nobody is signed in."""
        info = session.get("oauth_info") if self.mode == "space" else None
        if not info or info.get("expires_at", 0) < time.time():
            return None
        user = info.get("userinfo") or {}
        name = str(user.get("preferred_username", "")).lower()
        if not user.get("sub") or not name:
            return None
        writable = {
            str(organization.get("preferred_username") or "").lower()  # "name" is a display name, which anyone chooses
            for organization in user.get("orgs") or []
            if isinstance(organization, dict) and organization.get("roleInOrg") in WRITE_ROLES
        }
        is_admin = name in self.admins or (bool(self.owner) and self.owner in {name, *writable})
        return user, Role.ADMIN if is_admin else Role.USER


def browser_secret(connection: HTTPConnection) -> str:
    """Return the browser's secret from its cookie, or from the page's header where cookies are blocked; else "".

    Requests of other sites' pages have no secret.
    """
    if not is_same_origin(connection):
        return ""
    candidates = (connection.cookies.get(SESSION_COOKIE, ""), connection.headers.get(SESSION_HEADER, ""))
    return next((secret for secret in candidates if len(secret) in SECRET_LENGTH), "")


def is_same_origin(connection: HTTPConnection) -> bool:
    """Whether a request comes from this server's own pages, or from a client that is not a browser."""
    origin = connection.headers.get("origin")
    if origin is None and connection.headers.get("sec-fetch-site") in ("cross-site", "same-site"):
        return connection.headers.get("sec-fetch-mode") == "navigate"  # a link on another site
    return origin is None or origin.partition("://")[2] == connection.headers.get("host", "")


def bind_session(secret: str, session_hash: str) -> str:
    """Return the session hash that the server uses for a browser.

    A page chooses its session hash itself and sends it with every request. The server works with a hash of that value
    and the browser's secret, so whoever learns a session hash reaches nothing with it from another browser.
    """
    return hashlib.sha256(f"{secret}\n{session_hash}".encode()).hexdigest()[:40]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
