"""Tests of comparisons: order, failures, cancellation, scores, and the usage events that they record."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from inference.types import Answer, AnswerEvent, InferenceError, Queued, Request, TextUpdate
from recipes import Recipe, parse
from rewards import score_recipes
from storage.database import Database
from training.runs.run import Run, RunConfig, RunStore
from ui.playground.compare import Comparison, ComparisonMeter, compare
from usage.analytics import UsageAnalytics
from usage.budgets import Budget, Budgets
from usage.events import Deployment, UsageEvent
from usage.prices import Prices
from usage.recorder import Recorder
from usage.time_window import UsageFilter

HOSTED = "moondream3-preview"
VISITOR = "v1-" + "0" * 24


def snapshots(names: list[str], request: Request) -> list[Comparison]:
    return list(compare(names, request, threading.Event(), interval=0.0))


@pytest.mark.usefixtures("fake_models")
def test_every_candidate_of_every_model_arrives(photo: np.ndarray) -> None:
    last = snapshots(["one", "two"], Request(photo, "recipe", n=3))[-1]
    assert last.status == "done"
    assert [(column.name, column.status, len(column.candidates)) for column in last.columns] == [
        ("one", "done", 3),
        ("two", "done", 3),
    ]
    assert all(
        candidate.done and candidate.recipe and candidate.picture
        for column in last.columns
        for candidate in column.candidates
    )


@pytest.mark.usefixtures("fake_models")
def test_scores_equal_score_recipes_of_the_models_group(photo: np.ndarray) -> None:
    last = snapshots(["one", "two"], Request(photo, "recipe", n=4))[-1]
    for column in last.columns:
        expected = score_recipes(photo, [parse(candidate.text).recipe for candidate in column.candidates])
        assert [candidate.scores for candidate in column.candidates] == [scored.scores for scored in expected]
        assert [candidate.fidelity for candidate in column.candidates] == [scored.fidelity for scored in expected]


def test_late_candidate_changes_the_scores_of_its_group(photo: np.ndarray) -> None:
    recipe = str(Recipe(exposure=30))
    first_scored = threading.Event()

    def answer(name: str, request: Request, cancel: threading.Event) -> Iterator[AnswerEvent]:
        yield Answer(0, recipe)
        first_scored.wait(10)
        yield Answer(1, recipe)

    creativity = []
    for snapshot in compare(["x"], Request(photo, "recipe", n=2), threading.Event(), answer, interval=0.0):
        candidates = snapshot.columns[0].candidates
        if candidates[0].scores:
            creativity.append(candidates[0].scores["creativity"])
            first_scored.set()
    assert creativity[-1] < 0.9 * creativity[0]  # two equal recipes gain nothing from novelty


@pytest.mark.usefixtures("fake_models")
def test_first_snapshot_precedes_all_answers(photo: np.ndarray) -> None:
    first = next(compare(["slow"], Request(photo, "recipe", n=2), threading.Event()))
    assert first.status == "running"
    assert [candidate.done for candidate in first.columns[0].candidates] == [False, False]


@pytest.mark.usefixtures("fake_models")
@pytest.mark.parametrize(("name", "message"), [("broken", "Choose another one."), ("bug", "unexpected TypeError")])
def test_failure_stays_in_its_column(photo: np.ndarray, name: str, message: str) -> None:
    last = snapshots([name, "one"], Request(photo, "recipe", n=2))[-1]
    failed, done = last.columns
    assert (failed.status, done.status, last.status) == ("failed", "done", "done")
    assert message in failed.error
    assert all(candidate.done for candidate in done.candidates)


@pytest.mark.usefixtures("fake_models")
def test_cancelling_ends_the_run_and_keeps_finished_candidates(photo: np.ndarray) -> None:
    cancel = threading.Event()
    last = None
    for last in compare(["slow", "one"], Request(photo, "recipe", n=8), cancel, interval=0.0):
        if last.columns[1].status == "done":
            cancel.set()
    assert last is not None
    assert (last.status, last.columns[0].status, last.columns[1].status) == ("cancelled", "cancelled", "done")
    assert all(candidate.picture for candidate in last.columns[1].candidates)


def test_closing_the_generator_stops_the_models(photo: np.ndarray) -> None:
    stopped = threading.Event()

    def answer(name: str, request: Request, cancel: threading.Event) -> Iterator[AnswerEvent]:
        yield Queued(0)
        cancel.wait(10)
        stopped.set()

    run = compare(["x"], Request(photo, "query", "What?"), threading.Event(), answer)
    next(run)
    run.close()
    assert stopped.wait(10)


def test_snapshots_respect_the_interval(photo: np.ndarray) -> None:
    def answer(name: str, request: Request, cancel: threading.Event) -> Iterator[AnswerEvent]:
        for count in range(200):
            yield TextUpdate(0, "word " * count)
            time.sleep(0.001)
        yield Answer(0, "end")

    run = compare(["x"], Request(photo, "query", "What?"), threading.Event(), answer, interval=0.1)
    assert len(list(run)) < 60


@pytest.mark.usefixtures("fake_models")
def test_results_are_deterministic_per_seed(photo: np.ndarray) -> None:
    def texts(seed: int) -> list[str]:
        last = snapshots(["one"], Request(photo, "recipe", n=4, seed=seed))[-1]
        return [candidate.text for candidate in last.columns[0].candidates]

    assert texts(3) == texts(3) != texts(4)


@pytest.mark.usefixtures("fake_models")
def test_answer_without_a_recipe_is_not_scored(photo: np.ndarray) -> None:
    candidate = snapshots(["prose"], Request(photo, "recipe"))[-1].columns[0].candidates[0]
    assert candidate.done and candidate.recipe is None and candidate.scores == {} and candidate.picture is None


@pytest.mark.usefixtures("fake_models")
def test_without_pictures_keeps_recipes_only(photo: np.ndarray) -> None:
    kept = snapshots(["one"], Request(photo, "recipe", n=2))[-1].without_pictures()
    assert [candidate.picture for candidate in kept.columns[0].candidates] == [None, None]
    assert all(candidate.recipe for candidate in kept.columns[0].candidates)


# ── Usage events ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def meter(tmp_path: Path) -> ComparisonMeter:
    """Create a meter on a machine with a known price."""
    recorder = Recorder(Database(f"sqlite:///{tmp_path / 'x.sqlite3'}"), tmp_path / "spool", Deployment("topic", "c0"))
    return ComparisonMeter(recorder, Prices(), "cpu-upgrade")


def recorded_events(meter: ComparisonMeter) -> dict[str, UsageEvent]:
    """Return the recorded events by model."""
    meter.recorder.flush()
    return {event.model: event for event in UsageAnalytics(meter.recorder._database).recent(UsageFilter("week"))}


def test_each_model_is_recorded_as_one_event_with_its_numbers(meter: ComparisonMeter, photo: np.ndarray) -> None:
    def answer(name: str, request: Request, cancel: threading.Event) -> Iterator[AnswerEvent]:
        if name == "broken":
            raise InferenceError("out_of_memory", "No room.")
        for index in range(request.n):
            yield Answer(index, "exposure +20", tokens_in=740, tokens_out=9, seconds=3.6, first_token_seconds=0.5)

    request = Request(photo, "recipe", n=2)
    for _ in meter.compare(["fine", "broken"], request, threading.Event(), "api", VISITOR, answer, interval=0.0):
        pass
    events = recorded_events(meter)
    fine, broken = events["fine"], events["broken"]
    assert (fine.outcome, fine.tokens_in, fine.tokens_out, fine.tokens_basis) == ("ok", 740, 18, "reported")
    assert (fine.latency, fine.first_token, fine.candidates, fine.branch) == (3.6, 0.5, 2, "topic")
    assert fine.cost == pytest.approx(0.03 * 3.6 / 3600) and fine.cost_basis == "estimated"
    assert fine.reward is not None and 0 <= fine.reward <= 1
    assert (broken.outcome, broken.error, broken.cost, broken.tokens_in) == ("error", "out_of_memory", None, None)
    assert fine.request_id == broken.request_id and fine.session == VISITOR


def test_closed_page_is_recorded_as_cancelled(meter: ComparisonMeter, photo: np.ndarray) -> None:
    begun, ended = threading.Event(), threading.Event()

    def answer(name: str, request: Request, cancel: threading.Event) -> Iterator[AnswerEvent]:
        begun.set()
        try:
            cancel.wait(10)
            raise InferenceError("cancelled", "Cancelled.")
        finally:
            ended.set()
        yield

    run = meter.compare(["slow"], Request(photo, "recipe"), threading.Event(), "playground", answer=answer)
    next(run)
    begun.wait(10)
    run.close()
    ended.wait(10)
    for thread in threading.enumerate():
        if thread.name == "compare-slow":
            thread.join(10)
    assert recorded_events(meter)["slow"].outcome == "cancelled"


def test_steps_of_a_run_are_recorded_once(meter: ComparisonMeter, tmp_path: Path) -> None:
    run: Run = RunStore(tmp_path / "runs").create(RunConfig(base="tiny", reward={"sharpness": 1.0}, seed=1))
    run.set_status(state="done", ended=time.time())
    for step in (1, 2, 3):
        tokens = {"tokens": 9_000 * step, "answer_tokens": 25.5}
        run.append_metrics({"step": step, "seconds": 2.0 * step, "reward": 0.5, **tokens})
    answers = run.config().photos_per_step * run.config().rollouts
    meter.record_run(run)
    meter.record_run(run)
    meter.recorder.flush()
    assert UsageAnalytics(meter.recorder._database).metrics(UsageFilter("day")).calls.value == 3
    events = UsageAnalytics(meter.recorder._database).recent(UsageFilter("day"))
    tokens_out = round(25.5 * answers)
    assert {(event.tokens_in, event.tokens_out) for event in events} == {(9_000 - tokens_out, tokens_out)}


def test_hosted_calls_are_priced_by_tokens_and_stop_at_the_budget(meter: ComparisonMeter, photo: np.ndarray) -> None:
    budgets = Budgets(meter.recorder._database)
    metered = replace(meter, budgets=budgets)

    def answer(name: str, request: Request, cancel: threading.Event) -> Iterator[AnswerEvent]:
        for index in range(request.n):
            yield Answer(index, "exposure +20", tokens_in=735, tokens_out=45, estimated=index == 1)

    request = Request(photo, "recipe", n=2)
    for _ in metered.compare([HOSTED], request, threading.Event(), "api", "", answer, interval=0.0):
        pass
    event = recorded_events(meter)[HOSTED]
    assert (event.tokens_in, event.tokens_out, event.tokens_basis) == (1470, 90, "estimated")
    assert event.cost == pytest.approx(2 * 0.000333) and event.cost_basis == "estimated"
    budgets.set(Budget("topic", 0.0005, stop=True))
    request = Request(photo, "recipe")
    *_, last = metered.compare([HOSTED, "fine"], request, threading.Event(), "api", "", answer, interval=0.0)
    assert [column.status for column in last.columns] == ["failed", "done"]
    assert "is spent" in last.columns[0].error
