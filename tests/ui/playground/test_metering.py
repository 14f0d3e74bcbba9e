"""Counting calls: one event per model, whatever way a comparison ends; and a fine-tune's steps, each once."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from inference.types import Answer, Event, InferenceError, Request
from storage.database import Database
from training.runs.run import Run, RunConfig, Runs
from ui.playground.metering import ComparisonMeter
from usage.analytics import Usage
from usage.budgets import Budget, Budgets
from usage.events import Deployment
from usage.events import Event as Call
from usage.prices import Prices
from usage.recorder import Recorder
from usage.time_window import Filter


@pytest.fixture
def meter(tmp_path: Path) -> ComparisonMeter:
    """A meter on a machine whose price is known."""
    recorder = Recorder(Database(f"sqlite:///{tmp_path / 'x.sqlite3'}"), tmp_path / "spool", Deployment("topic", "c0"))
    return ComparisonMeter(recorder, Prices(), "cpu-upgrade")


def recorded(meter: ComparisonMeter) -> dict[str, Call]:
    meter.recorder.flush()
    return {call.model: call for call in Usage(meter.recorder._database).recent(Filter("week"))}


def says(name: str, request: Request, cancel: threading.Event) -> Iterator[Event]:
    if name == "broken":
        raise InferenceError("out_of_memory", "No room.")
    for index in range(request.n):
        yield Answer(index, "exposure +20", tokens_in=740, tokens_out=9, seconds=3.6, first_token_seconds=0.5)


def test_each_model_is_one_event_with_its_numbers(meter: ComparisonMeter, photo: np.ndarray) -> None:
    request = Request(photo, "recipe", n=2)
    for _ in meter.compare(["fine", "broken"], request, threading.Event(), "api", "tab", says, every=0.0):
        pass
    calls = recorded(meter)
    fine, broken = calls["fine"], calls["broken"]
    assert (fine.outcome, fine.tokens_in, fine.tokens_out, fine.tokens_basis) == ("ok", 740, 18, "reported")
    assert (fine.latency, fine.first_token, fine.candidates, fine.branch) == (3.6, 0.5, 2, "topic")
    assert fine.cost == pytest.approx(0.03 * 3.6 / 3600) and fine.cost_basis == "estimated"
    assert fine.reward is not None and 0 <= fine.reward <= 1
    assert (broken.outcome, broken.error, broken.cost, broken.tokens_in) == ("error", "out_of_memory", None, None)
    assert fine.request_id == broken.request_id and fine.session == "tab"


def test_a_page_that_goes_away_is_counted_as_cancelled(meter: ComparisonMeter, photo: np.ndarray) -> None:
    begun, ended = threading.Event(), threading.Event()

    def slow(name: str, request: Request, cancel: threading.Event) -> Iterator[Event]:
        begun.set()
        try:
            cancel.wait(10)
            raise InferenceError("cancelled", "Cancelled.")
        finally:
            ended.set()
        yield

    run = meter.compare(["slow"], Request(photo, "recipe"), threading.Event(), "playground", ask=slow)
    next(run)
    begun.wait(10)
    run.close()
    ended.wait(10)
    for thread in threading.enumerate():
        if thread.name == "ask-slow":
            thread.join(10)
    assert recorded(meter)["slow"].outcome == "cancelled"


def test_a_run_counts_each_step_once_however_often_it_is_read(meter: ComparisonMeter, tmp_path: Path) -> None:
    run: Run = Runs(tmp_path / "runs").create(RunConfig(base="tiny", reward={"sharpness": 1.0}, seed=1))
    run.set_status(state="done", ended=time.time())
    for step in (1, 2, 3):
        run.add("metrics", {"step": step, "seconds": 2.0 * step, "reward": 0.5})
    meter.count(run)
    meter.count(run)
    meter.recorder.flush()
    found = Usage(meter.recorder._database).figures(Filter("day")).calls.value
    assert found == 3


HOSTED = "moondream3-preview"


def test_hosted_calls_cost_what_their_tokens_do_and_stop_at_the_budget(
    meter: ComparisonMeter, photo: np.ndarray
) -> None:
    budgets = Budgets(meter.recorder._database)
    paid = replace(meter, budgets=budgets)

    def hosted(name: str, request: Request, cancel: threading.Event) -> Iterator[Event]:
        for index in range(request.n):
            yield Answer(index, "exposure +20", tokens_in=735, tokens_out=45, estimated=index == 1)

    for _ in paid.compare([HOSTED], Request(photo, "recipe", n=2), threading.Event(), "api", "", hosted, every=0.0):
        pass
    call = recorded(meter)[HOSTED]
    assert (call.tokens_in, call.tokens_out, call.tokens_basis) == (1470, 90, "estimated")
    assert call.cost == pytest.approx(2 * 0.000333) and call.cost_basis == "estimated"
    budgets.set(Budget("topic", 0.0005, stop=True))
    *_, last = paid.compare([HOSTED, "fine"], Request(photo, "recipe"), threading.Event(), "api", "", hosted, every=0.0)
    assert [column.status for column in last.columns] == ["failed", "done"]
    assert "is spent" in last.columns[0].error
