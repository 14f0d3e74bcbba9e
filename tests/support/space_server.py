"""The application in a process of its own, with the environment of a Hugging Face Space."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from settings import ROOT
from tests.support.openid_server import CLIENT_ID, CLIENT_SECRET, SCOPES, Account, OpenIdServer, openid_server
from tests.support.page_client import PageClient

OWNER = "acme"  # an organization
SPACE_HOST = "acme-playground.hf.space"
API_KEY, METRICS_TOKEN = "api-key-of-the-tests", "metrics-token-of-the-tests"
ACCOUNTS = (
    Account(OWNER),
    Account("grace"),  # in PLAYGROUND_ADMINS
    Account("wendy", orgs=((OWNER, "write"), ("others", "read"))),
    Account("rita", orgs=((OWNER, "read"), ("others", "admin"))),
    Account("ada"),
    Account("bob"),
)
START_SECONDS = 120.0  # generous: the machine may be busy


@dataclass(frozen=True)
class SpaceServer:
    """A running Space.

    Attributes:
        address: Its address on this machine.
        provider: The provider of the accounts.
        folder: Its data folder.
        log: File of its output.
        routes: Method and path of every route.
        handlers: Name of every handler of the page by number.
        host: Its host name, which the Host header of requests must contain.
    """

    address: str
    provider: OpenIdServer
    folder: Path
    log: Path
    routes: list[tuple[str, str]]
    handlers: dict[int, str]
    host: str = SPACE_HOST

    def guest(self) -> PageClient:
        """Open the page in a new browser."""
        client = PageClient(self.address, self.host)
        client.open()
        return client

    def number(self, name: str) -> int:
        """Return the number of the first handler with a name; see `access.permissions.HANDLERS`."""
        return next(number for number, other in self.handlers.items() if other == name)

    def signed_in(self, name: str) -> PageClient:
        """Open the page in a new browser and sign in."""
        client = self.guest()
        client.sign_in(name)
        return client


@contextmanager
def space_server(folder: Path) -> Iterator[SpaceServer]:
    """Run the application within the context.

    Args:
        folder: Folder for its data, cache and log.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    description, log, data = folder / "server.json", folder / "log", folder / "data"
    with openid_server(*ACCOUNTS) as provider, log.open("wb") as output:
        environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ},
            "SYSTEM": "spaces",
            "SPACE_ID": f"{OWNER}/playground",
            "SPACE_HOST": SPACE_HOST,
            "OAUTH_CLIENT_ID": CLIENT_ID,
            "OAUTH_CLIENT_SECRET": CLIENT_SECRET,
            "OAUTH_SCOPES": SCOPES,
            "OPENID_PROVIDER_URL": provider.address,
            "PLAYGROUND_ADMINS": "Grace",
            "PLAYGROUND_API_KEYS": API_KEY,
            "METRICS_TOKEN": METRICS_TOKEN,
            "GRADIO_SERVER_PORT": str(port),
            "GRADIO_SERVER_NAME": "127.0.0.1",
            "GRADIO_TEMP_DIR": str(folder / "gradio"),
            "GRADIO_ANALYTICS_ENABLED": "False",
            "HF_HUB_OFFLINE": "1",
            "DATA_DIR": str(data),
        }
        command = [sys.executable, "-m", "tests.support.space_main", str(description)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not description.exists():
                assert process.poll() is None, log.read_text(errors="replace")[-3000:]
                assert time.monotonic() < deadline, f"not started: {log.read_text(errors='replace')[-3000:]}"
                time.sleep(0.05)
            content = json.loads(description.read_text())
            routes = [(method, path) for method, path in content["routes"]]
            handlers = {int(number): name for number, name in content["handlers"].items()}
            yield SpaceServer(f"http://127.0.0.1:{port}", provider, data, log, routes, handlers)
        finally:
            process.kill()
            process.wait()
