"""Tests of usage metering: outcomes, and who pays for a call."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from inference.metering import AnswerFunction, UsageMeter
from inference.types import SKILLS, Answer, AnswerEvent, CandidateFailed, InferenceError, Queued, Request, TextUpdate
from storage.database import Database
from usage.analytics import UsageAnalytics
from usage.budgets import Budget, Budgets
from usage.events import Deployment, UsageEvent
from usage.prices import Prices
from usage.recorder import Recorder
from usage.time_window import UsageFilter

HOSTED = "moondream3.1-9B-A2B"
DOLLARS = 0.0002655  # published price of 735 input and 45 output tokens


@pytest.fixture
def database(tmp_path: Path) -> Database:
    """Return an empty SQLite database."""
    return Database(f"sqlite:///{tmp_path / 'x.sqlite3'}")


@pytest.fixture
def meter(database: Database, tmp_path: Path) -> UsageMeter:
    """Return a meter with budgets, on the branch "topic"."""
    recorder = Recorder(database, tmp_path / "spool", Deployment("topic"))
    return UsageMeter(recorder, Prices(), "cpu-upgrade", Budgets(database))


def backend(*events: AnswerEvent, error: Exception | None = None) -> AnswerFunction:
    """Return a simulated backend that yields these events and then raises `error`."""

    def answer(name: str, request: Request, cancel: threading.Event) -> Iterator[AnswerEvent]:
        yield from events
        if error:
            raise error

    return answer


def answers(count: int) -> list[Answer]:
    return [Answer(index, "", tokens_in=735, tokens_out=45, seconds=0.5) for index in range(count)]


def recorded(meter: UsageMeter, database: Database) -> UsageEvent:
    """Return the only recorded event."""
    meter.recorder.flush()
    (event,) = UsageAnalytics(database).recent(UsageFilter("day"))
    return event


@pytest.mark.parametrize(
    ("skill", "n", "temperature", "events", "outcome"),
    [
        ("caption", 1, 1.0, [Queued(0), TextUpdate(0, "a"), *answers(1)], "ok"),
        ("caption", 1, 1.0, [Queued(0), TextUpdate(0, "a")], "cancelled"),
        ("caption", 3, 1.0, answers(3), "ok"),
        ("caption", 3, 1.0, answers(2), "cancelled"),
        ("caption", 3, 1.0, [*answers(2), CandidateFailed(2, "Try again.")], "ok"),
        ("caption", 3, 0.0, answers(1), "ok"),
        ("detect", 3, 1.0, answers(1), "ok"),
        ("segment", 3, 1.0, answers(1), "ok"),
        ("segment", 3, 1.0, [Queued(0)], "cancelled"),
    ],
)
def test_consumer_that_stops_reading_is_cancelled_only_before_the_last_answer(
    meter: UsageMeter,
    database: Database,
    photo: np.ndarray,
    skill: str,
    n: int,
    temperature: float,
    events: Sequence[AnswerEvent],
    outcome: str,
) -> None:
    request = Request(photo, skill, "x", n=n, temperature=temperature)
    # The backend would go on: the consumer leaves after the last of these events.
    stream = meter.answer("local", request, threading.Event(), backend(*events, TextUpdate(0, "never read")), "v1")
    for _ in events:
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert recorded(meter, database).outcome == outcome


@pytest.mark.parametrize(
    ("count", "error", "outcome", "kind"),
    [
        (1, InferenceError("cancelled", "Cancelled."), "ok", ""),
        (0, InferenceError("cancelled", "Cancelled."), "cancelled", ""),
        (0, InferenceError("provider", "Try again."), "cancelled", ""),
        (0, None, "cancelled", ""),
        (1, TypeError("a bug"), "error", "TypeError"),
    ],
)
def test_outcome_of_a_call_whose_caller_has_set_cancel(
    meter: UsageMeter,
    database: Database,
    photo: np.ndarray,
    count: int,
    error: Exception | None,
    outcome: str,
    kind: str,
) -> None:
    cancel = threading.Event()
    stream = meter.answer("local", Request(photo, "caption"), cancel, backend(*answers(count), error=error), "v1")
    for _ in range(count):
        next(stream)
    cancel.set()
    try:
        assert list(stream) == []
    except Exception as raised:
        assert raised is error
    event = recorded(meter, database)
    assert (event.outcome, event.error) == (outcome, kind)


@pytest.mark.parametrize("error", [InferenceError("provider", "Try again."), ValueError("a bug")])
def test_failure_is_recorded_with_its_class(
    meter: UsageMeter, database: Database, photo: np.ndarray, error: Exception
) -> None:
    with pytest.raises(type(error)):
        list(meter.answer("local", Request(photo, "caption"), threading.Event(), backend(error=error), "v1"))
    event = recorded(meter, database)
    assert (event.outcome, event.error) == ("error", getattr(error, "kind", "ValueError"))


@pytest.mark.parametrize("skill", SKILLS)
def test_hosted_candidates_cost_one_call_each_and_regions_one_call_in_all(
    meter: UsageMeter, database: Database, photo: np.ndarray, skill: str
) -> None:
    request = Request(photo, skill, "" if skill == "caption" else "x", n=4)
    list(meter.answer(HOSTED, request, threading.Event(), backend(*answers(4)), "api"))
    event = recorded(meter, database)
    calls = 1 if SKILLS[skill].output == "regions" else 4
    assert (event.tokens_in, event.tokens_out) == (735 * calls, 45 * calls)
    assert event.cost == pytest.approx(DOLLARS * calls)


def test_spent_budget_neither_stops_nor_counts_calls_paid_with_the_visitors_key(
    meter: UsageMeter, database: Database, photo: np.ndarray
) -> None:
    budgets = Budgets(database)
    budgets.set(Budget("topic", DOLLARS, stop=True))
    request, run = Request(photo, "caption"), backend(*answers(1))
    list(meter.answer(HOSTED, request, threading.Event(), run, "api", payer="visitor"))
    event = recorded(meter, database)
    assert (event.payer, event.outcome, event.cost) == ("visitor", "ok", pytest.approx(DOLLARS))
    assert budgets.list()[0].spent == 0
    list(meter.answer(HOSTED, request, threading.Event(), run, "api"))
    meter.recorder.flush()
    assert budgets.list()[0].spent == pytest.approx(DOLLARS)
    with pytest.raises(InferenceError, match="is spent"):
        list(meter.answer(HOSTED, request, threading.Event(), run, "api"))
    list(meter.answer(HOSTED, request, threading.Event(), run, "api", payer="visitor"))
    meter.recorder.flush()
    events = UsageAnalytics(database).recent(UsageFilter("day"))
    paid = sorted((event.payer, event.outcome, event.error) for event in events)
    assert paid == [("deployment", "error", "budget"), ("deployment", "ok", ""), *2 * [("visitor", "ok", "")]]


def test_models_without_a_key_are_paid_by_the_deployment(
    meter: UsageMeter, database: Database, photo: np.ndarray
) -> None:
    list(
        meter.answer("local", Request(photo, "caption"), threading.Event(), backend(*answers(1)), "api", "", "visitor")
    )
    event = recorded(meter, database)
    assert event.payer == "deployment" and event.cost == pytest.approx(0.03 * 0.5 / 3600, abs=1e-9)
