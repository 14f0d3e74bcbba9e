"""The alarm of a run's result."""

from __future__ import annotations

import numpy as np
import pytest

from training.grpo.result import find_alarm


@pytest.mark.parametrize(
    ("reward", "no_signal", "gain", "message"),
    [
        ((0.4, 0.7), 0.0, -0.05, "does not generalise"),
        ((0.4, 0.7), 0.0, 0.05, ""),
        ((0.4, 0.4), 0.0, -0.05, ""),
        ((0.4, 0.4), 1.0, 0.0, "nothing to learn"),
    ],
)
def test_alarm_reports_overfitting_and_missing_signal(
    reward: tuple[float, float], no_signal: float, gain: float, message: str
) -> None:
    metrics = [{"reward": value, "no_signal": no_signal} for value in np.linspace(*reward, 40)]
    alarm = find_alarm(metrics, {"mean": gain, "low": gain - 0.1, "high": gain + 0.1})
    assert message in alarm
    assert bool(alarm) == bool(message)
