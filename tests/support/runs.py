"""Helpers for tests of training runs: a fake training command, a run config, and waiting for a condition."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from training.runs.run import RunConfig

FAKE = (sys.executable, "-m", "tests.support.fake_run")
CONFIG: dict[str, Any] = {"base": "moondream-tiny", "reward": {"sharpness": 1}, "seed": 1, "steps": 6}
TIMEOUT_SECONDS = 120.0  # generous: the machine may be busy


def make_config(**changes: Any) -> RunConfig:
    """Return a small valid config with `changes` applied."""
    return RunConfig.create(**(CONFIG | changes))


def until(condition: Callable[[], object], timeout: float = TIMEOUT_SECONDS) -> None:
    """Wait until `condition()` is true; fail after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not true after {timeout} seconds"
        time.sleep(0.02)
