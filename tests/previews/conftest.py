"""A small world for the deployer, anew for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.spaces_server import spaces_server
from previews import deploy as deploying
from tests.support.preview_world import World


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    import huggingface_hub.constants

    with spaces_server(tmp_path / "hub") as hub:
        (hub.folder / "site" / "sitecustomize.py").write_text("")  # nothing of Gradio's to change here
        hub.stale = 0.1
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(huggingface_hub.hf_api.constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(deploying, "HOT_LIMIT", 3.0)
        monkeypatch.setattr(deploying, "PATIENCE", 1.0)
        yield World(tmp_path / "repository", hub)
