"""The whole application, served on a free port with fake models beside its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

import app
from inference import registry
from settings import Settings
from tests.support import fake_backend
from tests.support.runs import FAKE
from ui.services import AppServices

WORKING_MODELS = ("one", "two", "three")
SPECIAL_MODELS = ("slow", "broken", "bug", "queued", "prose", "hostile")  # see fake_backend


@contextmanager
def app_server(
    folder: Path, training: tuple[str, ...] = FAKE, services: AppServices | None = None, **settings: Any
) -> Iterator[str]:
    """Serve the application with uvicorn, as `python app.py` does.

    Args:
        folder: The application's data folder.
        training: Command that does a run, given its folder; by default one that trains nothing.
        services: The application's services; built from the settings by default.
        **settings: Other fields of Settings.

    Yields:
        The application's address.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.BACKENDS, "fake", "tests.support.fake_backend")
        for name in (*WORKING_MODELS, *SPECIAL_MODELS):
            patch.setitem(registry.MODELS, name, fake_backend.fake_spec(name, name if name in SPECIAL_MODELS else ""))
        application = app.create_app(Settings(data_dir=folder, **settings), training, services)
        # Gradio keeps a stream open for each client: without a limit the shutdown would wait for it.
        config = uvicorn.Config(
            application,
            host="127.0.0.1",
            port=0,
            log_level="critical",
            timeout_graceful_shutdown=1,
            timeout_keep_alive=app.IDLE_SECONDS,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            thread.join(0.05)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        server.should_exit = True
        thread.join(10)
