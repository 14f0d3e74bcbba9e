"""The table of the page's handlers."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import app
from access.permissions import HANDLERS
from settings import Settings
from tests.support.server_routes import SPACE_HANDLERS, handler_names


def test_every_listed_handler_exists(tmp_path: Path) -> None:
    """Some exist only where runs work inside the request, as on ZeroGPU. The matrix test checks those of a Space."""
    with closing(app.build_services(Settings(data_dir=tmp_path))) as services:
        services.worker.inline = lambda folder: None
        assert set(HANDLERS) - set(handler_names(app.build_page(services)).values()) == SPACE_HANDLERS
