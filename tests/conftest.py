"""Shared fixtures: photos, a browser, a PostgreSQL database and a simulated Hugging Face Hub."""

import os
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import pytest

from training.data import bundled
from training.data.bundled import BundledPhoto

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.support.hub_server import HubServer

BROWSERS = ("chromium", "google-chrome", "chromium-browser")
BROWSER_ARGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
CI = os.environ.get("CI", "").lower() in ("1", "true")
# huggingface_hub reads this when it is imported, which another conftest does before pytest_configure.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    """Keep tests off the network and out of the developer's data folder."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    data = tempfile.TemporaryDirectory(prefix="playground-tests-")
    os.environ["DATA_DIR"] = data.name
    os.environ["GRADIO_TEMP_DIR"] = os.path.join(data.name, "gradio")  # another server that ends would empty it
    os.environ.pop("DATABASE_URL", None)
    config.add_cleanup(data.cleanup)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Repeat a browser test that fails in CI once, since it depends on the timing of a busy machine.

    The summary lists such tests with their first failure; see CONTRIBUTING.md.
    """
    for item in items if CI else ():
        if item.get_closest_marker("browser"):
            item.add_marker(pytest.mark.flaky(reruns=1))


def _missing(program: str, remedy: str) -> NoReturn:
    """Fail in CI, and skip with the reason elsewhere, where a program is not installed."""
    if CI:
        pytest.fail(f"CI requires {program}: {remedy}", pytrace=False)
    pytest.skip(f"{program} is not installed: {remedy}")


@pytest.fixture
def photo() -> np.ndarray:
    """Return a drawn photo, uint8 RGB [240, 320, 3]: sky, sun, hills, a red building and grain."""
    height, width = 240, 320
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    sky = np.stack([90 + rows * 0.5, 140 + rows * 0.35, 220 - rows * 0.2], axis=-1)
    ground = np.stack([60 + columns * 0.1, 110 - rows * 0.1 + 20 * np.sin(columns / 9), 50 + 0 * rows], axis=-1)
    hills = rows > 150 + 14 * np.sin(columns / 40)
    picture = np.where(hills[..., None], ground, sky)
    picture[(rows - 50) ** 2 + (columns - 250) ** 2 < 22**2] = (255, 236, 150)
    picture[140:190, 60:120] = (176, 48, 40)
    picture[155:190, 84:98] = (70, 40, 30)
    picture += np.random.default_rng(0).normal(0, 4, picture.shape)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def bundled_photos() -> list[BundledPhoto]:
    """Return all bundled photos."""
    return bundled.bundled_photos()


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Launch headless Chromium or Chrome without background requests; CHROMIUM overrides its path."""
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        _missing("browser", "install Chromium, or set CHROMIUM to its path")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=list(BROWSER_ARGS))
        yield running
        running.close()


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the URL of a PostgreSQL database: TEST_DATABASE_URL, or a server started for the session."""
    if os.environ.get("TEST_DATABASE_URL"):
        yield os.environ["TEST_DATABASE_URL"]
        return
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    binaries = found[-1].parent if found else None
    if binaries is None:
        _missing("PostgreSQL", "install it, or set TEST_DATABASE_URL to an empty database")
    if os.geteuid() == 0 and not shutil.which("runuser"):
        _missing("runuser", "PostgreSQL does not start as root; set TEST_DATABASE_URL to an empty database")
    yield from _start_postgres(binaries)


def _start_postgres(binaries: Path) -> Iterator[str]:
    """Start a server on a free port in a temporary folder, as the user postgres if the tests run as root."""
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(prefix="playground-postgres-") as folder:
        if as_user:
            shutil.chown(folder, "postgres")
        cluster, log = f"{folder}/cluster", f"{folder}/log"
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        options = f"-h 127.0.0.1 -p {port} -k {folder} -F"
        initdb = [f"{binaries}/initdb", "-D", cluster, "-U", "tester", "-A", "trust", "-E", "UTF8", "--locale=C", "-N"]
        control = [f"{binaries}/pg_ctl", "-D", cluster, "-w", "-l", log]
        subprocess.run([*as_user, *initdb], check=True, capture_output=True, cwd=folder)
        subprocess.run([*as_user, *control, "-o", options, "start"], check=True, stdout=subprocess.DEVNULL, cwd=folder)
        try:
            yield f"postgresql://tester@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run(
                [*as_user, *control, "-m", "immediate", "stop"], stdout=subprocess.DEVNULL, cwd=folder, check=False
            )


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """Yield the URL of an empty schema for one test, and drop it afterwards."""
    import psycopg.sql

    schema = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(psycopg.sql.SQL("CREATE SCHEMA {}").format(psycopg.sql.Identifier(schema)))
        yield f"{postgres_server}{'&' if '?' in postgres_server else '?'}options=-csearch_path%3D{schema}"
        connection.execute(psycopg.sql.SQL("DROP SCHEMA {} CASCADE").format(psycopg.sql.Identifier(schema)))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Iterator[HubServer]":
    """Run a simulated Hugging Face Hub and make this process use it."""
    import huggingface_hub.constants

    from tests.support.hub_server import TOKEN, run_hub_server

    with run_hub_server(tmp_path / "hub") as running:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.address)
        files = running.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running
