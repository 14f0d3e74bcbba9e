"""Fixtures of the interface's tests: models with a fake backend."""

from __future__ import annotations

import pytest

from inference import registry
from tests.support import fake_backend


@pytest.fixture
def fake_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the models one, two, slow, broken, bug and prose beside the real ones."""
    monkeypatch.setitem(registry.BACKENDS, "fake", "tests.support.fake_backend")
    for name in ("one", "two", "slow", "broken", "bug", "prose"):
        source = "" if name in ("one", "two") else name
        monkeypatch.setitem(registry.MODELS, name, fake_backend.fake_spec(name, source))
