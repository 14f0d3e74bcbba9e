"""Fixtures of the tests of access control: one Space for all files."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.space_server import SpaceServer, space_server


@pytest.fixture(scope="session")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SpaceServer]:
    """Run the application as in a Space."""
    with space_server(tmp_path_factory.mktemp("space")) as running:
        yield running
