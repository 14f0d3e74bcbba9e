"""Models of the tests, answered by a fake backend."""

from __future__ import annotations

import pytest

from inference import registry as models
from tests.support import fake_backend


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the models one, two, slow, broken, bug and prose beside the real ones."""
    monkeypatch.setitem(models.BACKENDS, "fake", "tests.support.fake_backend")
    for name in ("one", "two", "slow", "broken", "bug", "prose"):
        source = "" if name in ("one", "two") else name
        monkeypatch.setitem(models.MODELS, name, fake_backend.entry(name, source))
