"""A simulated OpenID provider, with the endpoints and claims of "Sign in with Hugging Face"."""

from __future__ import annotations

import base64
import json
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from joserfc import jwt
from joserfc.jwk import RSAKey

CLIENT_ID, CLIENT_SECRET = "simulated-client", "simulated-client-secret"
SCOPES = "openid profile"
LIFETIME_SECONDS = 8 * 3600


@dataclass(frozen=True)
class Account:
    """An account of the provider.

    Attributes:
        name: User name.
        orgs: The user's role in each organization, by the organization's name.
    """

    name: str
    orgs: tuple[tuple[str, str], ...] = ()

    @property
    def sub(self) -> str:
        """The account's id."""
        return f"id-of-{self.name}"

    def claims(self) -> dict[str, Any]:
        """Return the claims of the account in an ID token."""
        organizations = [
            {"sub": f"id-of-{name}", "name": f"The {name} company", "preferred_username": name, "roleInOrg": role}
            for name, role in self.orgs
        ]
        return {
            "sub": self.sub,
            "name": self.name.capitalize(),
            "preferred_username": self.name,
            "profile": f"https://huggingface.co/{self.name}",
            "picture": "https://huggingface.co/avatars/simulated.svg",
            "orgs": organizations,
        }


class OpenIdServer(ThreadingHTTPServer):
    """A provider on a free port of this machine. A request chooses its account with the parameter `account`."""

    def __init__(self, accounts: list[Account]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.accounts = {account.name: account for account in accounts}
        self.key = RSAKey.generate_key(2048, {"kid": "1", "use": "sig", "alg": "RS256"})
        self.codes: dict[str, dict[str, str]] = {}  # parameters of the authorization request, by its code

    @property
    def address(self) -> str:
        """The provider's address."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: OpenIdServer

    def do_GET(self) -> None:
        url, address = urlsplit(self.path), self.server.address
        if url.path == "/.well-known/openid-configuration":
            self.answer(
                {
                    "issuer": address,
                    "authorization_endpoint": f"{address}/oauth/authorize",
                    "token_endpoint": f"{address}/oauth/token",
                    "jwks_uri": f"{address}/oauth/jwks",
                    "id_token_signing_alg_values_supported": ["RS256"],
                }
            )
        elif url.path == "/oauth/jwks":
            self.answer({"keys": [self.server.key.as_dict(private=False)]})
        elif url.path == "/oauth/authorize":
            request = {name: values[-1] for name, values in parse_qs(url.query).items()}
            assert request["client_id"] == CLIENT_ID and request["account"] in self.server.accounts
            code = secrets.token_urlsafe(16)
            self.server.codes[code] = request
            query = urlencode({"code": code, "state": request["state"]})
            self.send_response(303)
            separator = "&" if "?" in request["redirect_uri"] else "?"
            self.send_header("Location", f"{request['redirect_uri']}{separator}{query}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.answer({"error": "not found"}, 404)

    def do_POST(self) -> None:
        body = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        credentials = base64.b64encode(f"{CLIENT_ID}:{CLIENT_SECRET}".encode()).decode()
        request = self.server.codes.pop(body.get("code", [""])[-1], None)
        if request is None or self.headers.get("Authorization") != f"Basic {credentials}":
            self.answer({"error": "invalid_grant"}, 400)
            return
        now = int(time.time())
        claims = {
            **self.server.accounts[request["account"]].claims(),
            "iss": self.server.address,
            "aud": CLIENT_ID,
            "nonce": request["nonce"],
            "iat": now,
            "exp": now + LIFETIME_SECONDS,
        }
        token = {
            "access_token": f"hf_oauth_{secrets.token_urlsafe(16)}",
            "token_type": "bearer",
            "expires_in": LIFETIME_SECONDS,
            "scope": SCOPES,
            "id_token": jwt.encode({"alg": "RS256", "kid": "1"}, claims, self.server.key),
        }
        self.answer(token)

    def answer(self, payload: object, code: int = 200) -> None:
        """Send a JSON response."""
        body = json.dumps(payload).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def openid_server(*accounts: Account) -> Iterator[OpenIdServer]:
    """Serve within the context."""
    server = OpenIdServer(list(accounts))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
