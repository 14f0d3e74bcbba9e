"""Tests of the warm-up."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from ui.playground import warm_up
from ui.playground.warm_up import WarmUp


def test_example_is_computed_once_at_low_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    priorities = []
    monkeypatch.setattr(
        warm_up,
        "compute_example",
        lambda: priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())),
    )
    loader = WarmUp(delay=0)
    loader.join()  # not started yet
    for _ in range(3):
        loader.start()
    loader.join()
    assert len(priorities) == 1
    if sys.platform == "linux":
        assert priorities[0] >= warm_up.NICENESS
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < warm_up.NICENESS


def test_missing_models_are_no_error(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ImportError("no torch")

    monkeypatch.setattr(warm_up, "compute_example", fail)
    loader = WarmUp(delay=0)
    loader.start()
    loader.join()
    assert [record.levelname for record in caplog.records] in ([], ["INFO"])
