"""Tests of the usage events of local runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import make_config
from training.runs.run import RunStore
from training.runs.usage_events import run_events


def test_each_step_of_a_local_run_has_its_tokens_time_and_cost(tmp_path: Path) -> None:
    run = RunStore(tmp_path).create(make_config(photos_per_step=2, rollouts=4))
    run.append_metrics({"step": 1, "seconds": 3.0, "tokens": 6_000, "answer_tokens": 20.0, "reward": 0.4})
    run.append_metrics({"step": 2, "seconds": 5.0, "tokens": 12_100, "answer_tokens": 25.0, "reward": 0.5})
    run.append_metrics({"step": 3, "seconds": 9.0})  # as earlier versions logged a step
    run.set_status(state="done", ended=1_000_000.0)
    first, second, third = run_events(run, lambda seconds: seconds / 1000)
    assert (first.tokens_in, first.tokens_out, first.tokens_basis) == (6_000 - 8 * 20, 8 * 20, "reported")
    assert (second.tokens_in, second.tokens_out, second.latency) == (6_100 - 8 * 25, 8 * 25, 2.0)
    assert (third.tokens_in, third.tokens_basis, third.reward) == (None, "unknown", None)
    assert second.cost == pytest.approx(0.002) and second.cost_basis == "estimated"
    assert {(event.source, event.adapter, event.candidates) for event in (first, second, third)} == {
        ("fine-tune", run.id, 8)
    }
