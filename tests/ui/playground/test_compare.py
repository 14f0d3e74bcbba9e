"""Several models at once: order, failures, cancelling, and the scores of score_recipes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from inference.types import Answer, Event, Queued, Request, TextUpdate
from recipes import Recipe, parse
from rewards import score_recipes
from ui.playground.compare import Comparison, compare


def snapshots(names: list[str], request: Request, **settings: object) -> list[Comparison]:
    return list(compare(names, request, threading.Event(), every=0.0, **settings))  # type: ignore[arg-type]


@pytest.mark.usefixtures("fakes")
def test_every_candidate_of_every_model_arrives(photo: np.ndarray) -> None:
    last = snapshots(["one", "two"], Request(photo, "recipe", n=3))[-1]
    assert last.status == "done"
    assert [(column.name, column.status, len(column.cards)) for column in last.columns] == [
        ("one", "done", 3),
        ("two", "done", 3),
    ]
    assert all(card.done and card.recipe and card.picture for column in last.columns for card in column.cards)


@pytest.mark.usefixtures("fakes")
def test_scores_are_those_of_score_recipes_for_the_models_group(photo: np.ndarray) -> None:
    last = snapshots(["one", "two"], Request(photo, "recipe", n=4))[-1]
    for column in last.columns:
        expected = score_recipes(photo, [parse(card.text).recipe for card in column.cards])
        assert [card.scores for card in column.cards] == [scored.scores for scored in expected]
        assert [card.fidelity for card in column.cards] == [scored.fidelity for scored in expected]


def test_a_late_candidate_changes_the_scores_of_its_group(photo: np.ndarray) -> None:
    recipe = str(Recipe(exposure=30))
    arrive = threading.Event()

    def ask(name: str, request: Request, cancel: threading.Event) -> Iterator[Event]:
        yield Answer(0, recipe)
        arrive.wait(10)
        yield Answer(1, recipe)

    creativity = []
    for snapshot in compare(["x"], Request(photo, "recipe", n=2), threading.Event(), ask, every=0.0):
        cards = snapshot.columns[0].cards
        if cards[0].scores:
            creativity.append(cards[0].scores["creativity"])
            arrive.set()
    assert creativity[0] != creativity[-1] == 0.0  # two alike are not creative


@pytest.mark.usefixtures("fakes")
def test_the_first_snapshot_comes_before_any_answer(photo: np.ndarray) -> None:
    first = next(compare(["slow"], Request(photo, "recipe", n=2), threading.Event()))
    assert first.status == "running"
    assert [card.done for card in first.columns[0].cards] == [False, False]


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize(("name", "words"), [("broken", "Choose another one."), ("bug", "unexpected TypeError")])
def test_a_failure_stays_in_its_column(photo: np.ndarray, name: str, words: str) -> None:
    last = snapshots([name, "one"], Request(photo, "recipe", n=2))[-1]
    failed, fine = last.columns
    assert (failed.status, fine.status, last.status) == ("failed", "done", "done")
    assert words in failed.error
    assert all(card.done for card in fine.cards)


@pytest.mark.usefixtures("fakes")
def test_cancelling_ends_the_run_and_keeps_what_is_ready(photo: np.ndarray) -> None:
    cancel = threading.Event()
    last = None
    for last in compare(["slow", "one"], Request(photo, "recipe", n=8), cancel, every=0.0):
        if last.columns[1].status == "done":
            cancel.set()
    assert last is not None
    assert (last.status, last.columns[0].status, last.columns[1].status) == ("cancelled", "cancelled", "done")
    assert all(card.picture for card in last.columns[1].cards)


def test_closing_the_generator_stops_the_models(photo: np.ndarray) -> None:
    stopped = threading.Event()

    def ask(name: str, request: Request, cancel: threading.Event) -> Iterator[Event]:
        yield Queued(0)
        cancel.wait(10)
        stopped.set()

    run = compare(["x"], Request(photo, "query", "What?"), threading.Event(), ask)
    next(run)
    run.close()
    assert stopped.wait(10)


def test_snapshots_do_not_come_faster_than_asked(photo: np.ndarray) -> None:
    def ask(name: str, request: Request, cancel: threading.Event) -> Iterator[Event]:
        for count in range(200):
            yield TextUpdate(0, "word " * count)
            time.sleep(0.001)
        yield Answer(0, "end")

    run = compare(["x"], Request(photo, "query", "What?"), threading.Event(), ask, every=0.1)
    assert len(list(run)) < 60


@pytest.mark.usefixtures("fakes")
def test_a_seed_decides_the_result(photo: np.ndarray) -> None:
    def texts(seed: int) -> list[str]:
        last = snapshots(["one"], Request(photo, "recipe", n=4, seed=seed))[-1]
        return [card.text for card in last.columns[0].cards]

    assert texts(3) == texts(3) != texts(4)


@pytest.mark.usefixtures("fakes")
def test_an_answer_without_a_recipe_is_no_candidate_for_scores(photo: np.ndarray) -> None:
    card = snapshots(["prose"], Request(photo, "recipe"))[-1].columns[0].cards[0]
    assert card.done and card.recipe is None and card.scores == {} and card.picture is None


@pytest.mark.usefixtures("fakes")
def test_a_session_keeps_no_pictures(photo: np.ndarray) -> None:
    kept = snapshots(["one"], Request(photo, "recipe", n=2))[-1].without_pictures()
    assert [card.picture for card in kept.columns[0].cards] == [None, None]
    assert all(card.recipe for card in kept.columns[0].cards)
