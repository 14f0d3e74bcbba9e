"""Fixtures of the preview tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.spaces_server import spaces_server
from previews import deploy
from previews import hub as hub_client
from tests.support.preview_world import PreviewWorld


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PreviewWorld]:
    """Provide a repository and a simulated Hub, with short timeouts."""
    import huggingface_hub.constants

    with spaces_server(tmp_path / "hub") as hub:
        (hub.folder / "site" / "sitecustomize.py").write_text("")  # the small application has no Gradio to patch
        hub.stale_seconds, hub.poll = 0.1, 0.02
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(huggingface_hub.hf_api.constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(deploy, "HOT_RELOAD_TIMEOUT", 1.5)
        monkeypatch.setattr(deploy, "CONCURRENT_DEPLOY_TIMEOUT", 1.0)
        monkeypatch.setattr(hub_client, "RETRY_DELAY", 0.05)
        yield PreviewWorld(tmp_path / "repository", hub)
