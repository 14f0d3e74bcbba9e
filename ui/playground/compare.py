"""Comparison of several models on one photo: run them in parallel, parse and score their answers. Uses no Gradio."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from statistics import fmean

import numpy as np

from inference.metering import AnswerFunction, CallTracker, UsageMeter
from inference.registry import MODELS, answer
from inference.types import (
    SKILLS,
    Answer,
    Box,
    CandidateFailed,
    InferenceError,
    Point,
    Queued,
    Request,
    TextUpdate,
)
from recipes import Recipe, jpeg_data_url, parse, shrink
from rewards import EQUAL_WEIGHTS, score_recipes
from training.runs.run import Run, RunError
from training.runs.usage_events import run_events
from usage.events import Payer
from usage.machine import JOBS

PICTURE_QUALITY = 82  # JPEG; a 512 px picture takes 20-45 kB
UNEXPECTED_ERROR = "The model failed with an unexpected {}. Run again; if it fails again, remove this model."
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """One answer of one model.

    Attributes:
        index: Number within the model's answers, from 0.
        text: The text generated so far.
        done: Whether the candidate is finished.
        recipe: The parsed recipe; None if the skill is another one or the text has no recipe.
        problems: What the parser corrected or ignored.
        scores: Score of each reward in [0, 1]; None where a reward does not apply. Empty without a recipe.
        fidelity: Color difference to the photo (mean CIEDE2000).
        picture: The rendered picture as a data URL.
        error: Why this candidate failed; the model's other candidates may have succeeded.

    The other attributes are those of `inference.types.Answer`.
    """

    index: int
    text: str = ""
    done: bool = False
    recipe: Recipe | None = None
    problems: tuple[str, ...] = ()
    scores: dict[str, float | None] = field(default_factory=dict)
    fidelity: float | None = None
    picture: str | None = None
    boxes: tuple[Box, ...] = ()
    points: tuple[Point, ...] = ()
    seconds: float = 0.0
    queue_seconds: float = 0.0
    path: str = ""
    reasoning: str = ""
    grounded: tuple[tuple[int, int], ...] = ()
    possible_extra_charges: int = 0
    error: str = ""


@dataclass(frozen=True)
class Column:
    """One model's part of a comparison.

    Attributes:
        name: Key of the model in MODELS.
        title: The model's title.
        note: The model's description.
        status: "waiting", "running", "done", "failed" or "cancelled".
        position: Number of requests ahead in the queue.
        error: Why the model failed.
        candidates: The model's candidates by index.
    """

    name: str
    title: str
    note: str = ""
    status: str = "waiting"
    position: int = 0
    error: str = ""
    candidates: tuple[Candidate, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether the model has ended."""
        return self.status in ("done", "failed", "cancelled")


@dataclass(frozen=True)
class Comparison:
    """A snapshot of a comparison.

    Attributes:
        skill: Key of the skill in SKILLS.
        columns: One column per model.
        status: "running", "done" or "cancelled".
        seconds: Time since the start.
    """

    skill: str
    columns: tuple[Column, ...] = ()
    status: str = "running"
    seconds: float = 0.0

    def without_pictures(self) -> Comparison:
        """Return a copy without rendered pictures, small enough to be kept for each session."""
        columns = (
            replace(column, candidates=tuple(replace(candidate, picture=None) for candidate in column.candidates))
            for column in self.columns
        )
        return replace(self, columns=tuple(columns))


@dataclass(frozen=True)
class ModelFailed:
    """Event: a model failed as a whole or was cancelled."""

    message: str
    cancelled: bool = False


class ModelDone:
    """Event: a model has answered all candidates."""


def compare(
    names: list[str], request: Request, cancel: threading.Event, answer: AnswerFunction = answer, interval: float = 0.1
) -> Generator[Comparison, None, None]:
    """Run several models in parallel, one thread each.

    A model that fails has the status "failed" in its own column; the others continue.

    Args:
        names: Keys of the models in MODELS.
        request: The request to every model.
        cancel: Set it, or close the generator, to stop the models at their next token.
        answer: Function that runs one model.
        interval: Minimum time between two snapshots, in seconds.

    Yields:
        A snapshot whenever something has changed, and at least once a second.
    """
    events: queue.Queue[tuple[int, object]] = queue.Queue()
    preview = shrink(request.photo)
    columns = []
    for name in names:
        spec = MODELS.get(name)
        candidates = tuple(Candidate(index) for index in range(request.n))
        columns.append(Column(name, spec.title if spec else name, spec.note if spec else "", candidates=candidates))
    started = time.monotonic()
    for index, name in enumerate(names):
        arguments = (index, name, request, cancel, answer, events)
        threading.Thread(target=_run_model, args=arguments, name=f"compare-{name}", daemon=True).start()
    try:
        yield Comparison(request.skill, tuple(columns))
        while True:
            columns = _apply_events(columns, _pending_events(events, 1.0), preview, request.skill)
            finished = all(column.finished for column in columns)
            status = ("cancelled" if cancel.is_set() else "done") if finished else "running"
            yield Comparison(request.skill, tuple(columns), status, time.monotonic() - started)
            if finished:
                return
            time.sleep(interval)
    finally:
        cancel.set()


@dataclass(frozen=True)
class ComparisonMeter(UsageMeter):
    """Records the usage events of comparisons and training runs."""

    def compare(
        self,
        names: list[str],
        request: Request,
        cancel: threading.Event,
        source: str,
        session: str = "",
        answer: AnswerFunction = answer,
        interval: float = 0.1,
        payer: Payer = "deployment",
    ) -> Generator[Comparison, None, None]:
        """Run `compare` and record one usage event per model.

        The recorded reward is the mean over the scored candidates with equal weights: the sliders move after the call.

        Args:
            names: Keys of the models in MODELS.
            request: The request to every model.
            cancel: Stops the models.
            source: What made the call, such as "playground" or "api".
            session: Salted hash of the visitor; see `UsageEvent`.
            answer: Function that runs one model.
            interval: Minimum time between two snapshots, in seconds.
            payer: Who pays for the models that need a key: "visitor" if `answer` uses the visitor's own key.
        """
        calls = CallTracker(self, request, answer, source, session, payer=payer)
        try:
            for snapshot in compare(names, request, cancel, calls.answer, interval):
                for column in snapshot.columns:
                    if column.finished:
                        totals = [EQUAL_WEIGHTS.total(candidate.scores) for candidate in column.candidates]
                        known = [total for total in totals if total is not None]
                        calls.record_reward(column.name, fmean(known) if known else None)
                yield snapshot
        finally:
            calls.close()

    def record_run(self, run: Run) -> None:
        """Record one usage event per step of a finished training run. Recording a run again has no effect."""
        for event in run_events(run, self._price_of(run)):
            self.recorder.record(event.with_deployment(self.recorder.deployment))

    def _price_of(self, run: Run) -> Callable[[float], float | None]:
        """Return the cost of seconds of the machine that a run used."""
        with suppress(RunError):
            config = run.config()
            if config.backend == "jobs":
                return lambda seconds: self.prices.machine(f"{JOBS}{config.hardware}", seconds)
        return self.machine_cost


def _run_model(
    index: int,
    name: str,
    request: Request,
    cancel: threading.Event,
    answer: AnswerFunction,
    events: queue.Queue[tuple[int, object]],
) -> None:
    """Put a model's events into the queue, and one for its end or failure. Runs in the model's thread."""
    try:
        for event in answer(name, request, cancel):
            events.put((index, event))
            if cancel.is_set():
                break
        events.put((index, ModelFailed("", cancelled=True) if cancel.is_set() else ModelDone()))
    except InferenceError as error:
        events.put((index, ModelFailed(error.message, cancelled=error.kind == "cancelled" or cancel.is_set())))
    except Exception as error:
        _log.exception("%s failed", name)
        events.put((index, ModelFailed(UNEXPECTED_ERROR.format(type(error).__name__))))


def _pending_events(events: queue.Queue[tuple[int, object]], timeout: float) -> list[tuple[int, object]]:
    """Wait for the first event, up to `timeout` seconds, and take all that are in the queue."""
    pending = []
    try:
        pending.append(events.get(timeout=timeout))
        while True:
            pending.append(events.get_nowait())
    except queue.Empty:
        return pending


def _apply_events(
    columns: list[Column], events: list[tuple[int, object]], preview: np.ndarray, skill: str
) -> list[Column]:
    """Apply events to the columns, then score each column that has new recipes as one group."""
    columns = list(columns)
    answered = set()
    for index, event in events:
        columns[index] = apply_event(columns[index], event, skill)
        if isinstance(event, Answer):
            answered.add(index)
    if SKILLS[skill].output == "recipe":
        for index in answered:
            columns[index] = replace(columns[index], candidates=_scored(columns[index].candidates, preview))
    return columns


def apply_event(column: Column, event: object, skill: str) -> Column:
    """Return the column after one event of its model."""
    match event:
        case Queued(position=position):
            return replace(column, status="waiting" if position else "running", position=position)
        case TextUpdate(index=index, text=text):
            return _with_candidate(replace(column, status="running"), replace(column.candidates[index], text=text))
        case Answer():
            return _with_candidate(replace(column, status="running"), _candidate(event, skill))
        case CandidateFailed(index=index, message=message):
            return _with_candidate(column, replace(column.candidates[index], done=True, error=message))
        case ModelFailed(message=message, cancelled=cancelled):
            return replace(column, status="cancelled" if cancelled else "failed", error=message)
        case _:
            return replace(column, status="done")


def _with_candidate(column: Column, candidate: Candidate) -> Column:
    candidates = (candidate if old.index == candidate.index else old for old in column.candidates)
    return replace(column, candidates=tuple(candidates))


def _candidate(answer: Answer, skill: str) -> Candidate:
    candidate = Candidate(
        answer.index,
        answer.text,
        done=True,
        boxes=tuple(answer.boxes),
        points=tuple(answer.points),
        seconds=answer.seconds,
        queue_seconds=answer.queue_seconds,
        path=answer.path,
        reasoning=answer.reasoning,
        grounded=answer.grounded,
        possible_extra_charges=answer.possible_extra_charges,
    )
    if SKILLS[skill].output != "recipe":
        return candidate
    parsed = parse(answer.text)
    return replace(candidate, recipe=parsed.recipe if parsed.ok else None, problems=parsed.problems)


def _scored(candidates: tuple[Candidate, ...], preview: np.ndarray) -> tuple[Candidate, ...]:
    """Score the candidates with a recipe as one group and encode the pictures that are missing."""
    group = [(candidate, candidate.recipe) for candidate in candidates if candidate.recipe is not None]
    results = score_recipes(preview, [recipe for _, recipe in group])
    scored = {
        candidate.index: replace(
            candidate,
            scores=dict(result.scores),
            fidelity=result.fidelity,
            picture=candidate.picture or jpeg_data_url(result.picture, PICTURE_QUALITY),
        )
        for (candidate, _), result in zip(group, results, strict=True)
    }
    return tuple(scored.get(candidate.index, candidate) for candidate in candidates)
