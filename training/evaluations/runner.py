"""Do an evaluation: copy the photos, let all models answer, score the answers and the reference recipes. Resumable.

Photos are worked on in chunks, one after another, so that memory does not grow with their number and the first
leaderboard is paired. Local models answer a chunk in batches of many rows; the answers are scored meanwhile in another
thread. Hosted models are called in parallel, within their request rate.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from inference.metering import AnswerFunction, CallTracker, UsageMeter
from inference.registry import answer, answer_batch
from inference.types import SKILLS, Answer, CandidateFailed, InferenceError, ModelSpec, Request
from recipes import Recipe, encode_jpeg, load_photo, parse
from rewards import REWARDS
from rewards.report import random_recipes, score_each
from storage.files import write_atomically
from training.data.sources import PhotoSet, PhotoSourceError, degrade, stream_photos
from training.evaluations.evaluation import Evaluation, EvaluationConfig, acquire
from training.evaluations.export import write_parquet
from training.evaluations.leaderboard import leaderboard
from training.runs.run import RunError
from usage.events import Payer

CHUNK = 16  # photos
BATCH_ROWS, LARGE_MODEL_ROWS = 64, 16  # candidates per batch; models that name `memory_bytes` need much more memory
MIN_ALONE_EVERY, ALONE_PHOTOS = 6, 16  # photos that are answered alone, which measures the latency of a call
HOSTED_CALLS = 4  # at the same time
MAX_FAILURES = 10  # of one model in a row
STATUS_SECONDS = 0.5
PHOTO_QUALITY = 95  # JPEG
NICENESS = 5  # of the threads that score, in the application
POOL_SECONDS = 1.7  # assumed per photo until it is measured, for 256 recipes
FATAL_ERRORS = ("budget", "unknown_model", "unavailable", "missing_weights", "bad_weights", "wrong_tokenizer")
CANCELLED = "Cancelled. Resume the evaluation to complete it."
SOURCE = "evaluate"  # of the usage events


class EvaluationStopped(Exception):  # noqa: N818
    """Raised when an evaluation cannot continue. The message says why; what was answered is kept."""


@dataclass(frozen=True)
class ModelAccess:
    """How the models of an evaluation are called.

    Attributes:
        specs: The models by name.
        answer: Function that runs one model, given its name.
        meter: Records one usage event per request, and checks the budget before each one that is paid.
        session: Hash of the visitor, for the usage events.
        payer: Who pays for the models that need a key.
    """

    specs: Mapping[str, ModelSpec]
    answer: AnswerFunction
    meter: UsageMeter
    session: str = ""
    payer: Payer = "deployment"

    @classmethod
    def of_specs(cls, specs: Mapping[str, ModelSpec], meter: UsageMeter) -> ModelAccess:
        """Return the access of a program that may use all these models."""
        return cls(specs, lambda name, request, cancel: answer(specs[name], request, cancel), meter)


@dataclass(frozen=True)
class _Answered:
    """One model's answers to one photo, before they are scored.

    Attributes:
        photo: Index of the photo.
        model: Index of the model.
        answers: The answers by candidate.
        tracker: Holds the usage event back until the answers are scored.
        batch: Photos that were answered together.
        error: Why there are fewer answers than candidates.
    """

    photo: int
    model: int
    answers: list[Answer]
    tracker: CallTracker
    batch: int = 1
    error: str = ""


def run_evaluation(
    evaluation: Evaluation,
    access: ModelAccess,
    cancel: threading.Event | None = None,
    workers: int = 1,
    cache_folder: Path | None = None,
) -> None:
    """Do an evaluation, or what is left of it, and store how it ended in its status.

    Args:
        evaluation: The evaluation.
        access: How its models are called.
        cancel: Set it to stop; the file `cancel` in the folder does the same between two batches.
        workers: Threads that score.
        cache_folder: Folder of reference scores that evaluations of the same photos share; None for no cache.

    Raises:
        RunError: Another process works on the evaluation, or its folder cannot be written.
    """
    with acquire(evaluation):
        runner = _Runner(evaluation, access, cancel or threading.Event(), workers, cache_folder)
        try:
            runner.run()
        except (EvaluationStopped, PhotoSourceError, RunError) as error:
            evaluation.set_status(state="failed", ended=time.time(), message=str(error), eta=0.0)
        except InferenceError as error:
            state = "cancelled" if error.kind == "cancelled" else "failed"
            message = CANCELLED if state == "cancelled" else error.message
            evaluation.set_status(state=state, ended=time.time(), message=message, eta=0.0)
        except OSError as error:
            raise RunError(f"The evaluation's folder cannot be written ({error.strerror}).") from None
        finally:
            for tracker in list(runner.open):
                tracker.close()


class _Runner:
    """The work on one evaluation."""

    def __init__(
        self,
        evaluation: Evaluation,
        access: ModelAccess,
        cancel: threading.Event,
        workers: int,
        cache_folder: Path | None,
    ) -> None:
        self.evaluation, self.access, self.cancel = evaluation, access, cancel
        self.workers, self.cache_folder = workers, cache_folder
        self.config: EvaluationConfig = evaluation.config()
        self.failures = [0] * len(self.config.models)
        self.open: set[CallTracker] = set()  # whose usage events wait for a reward
        self._lock = threading.Lock()
        self._status_time = 0.0

    def run(self) -> None:
        """Do all phases. Raises EvaluationStopped, PhotoSourceError, InferenceError or OSError."""
        self.evaluation.set_status(state="running", started=time.time(), ended=0.0, message="", phase="copying photos")
        photos = self.evaluation.photos() or self._copy_photos()
        self._check_models()
        with ThreadPoolExecutor(self.workers, initializer=_lower_priority) as scoring:
            self._answer_all(len(photos), scoring)
            if self.config.is_scored and self.config.pool:
                self._score_references(photos, scoring)
        results = self.evaluation.results()
        write_parquet(results, self.evaluation.folder / "scores.parquet")
        table = leaderboard(results, self.config.function)
        write_atomically(self.evaluation.folder / "result.json", json.dumps(table, indent=1))
        self.evaluation.set_status(state="done", phase="", ended=time.time(), message="", eta=0.0)

    # ── Photos ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _copy_photos(self) -> list[dict[str, Any]]:
        """Copy the photos to the folder, one at a time."""
        config, report, rows = self.config, PhotoSet(), []
        hub_token = False if self.evaluation.owner else None  # a visitor cannot read what this deployment can
        stream = stream_photos(config.photos, "held-out", config.max_photos, config.seed, report, hub_token)
        for index, (name, photo) in enumerate(stream):
            self._check_cancelled()
            if config.degraded is not None:
                photo = degrade(photo, np.random.default_rng([config.degraded, index]))
            data = encode_jpeg(photo, PHOTO_QUALITY)
            self.evaluation.photo_file(index).write_bytes(data)
            rows.append({"name": name, "digest": hashlib.sha256(data).hexdigest()[:32]})
            self._report("copying photos", index + 1, 0, 0.0)
        write_atomically(self.evaluation.folder / "photos.json", json.dumps(rows))
        return rows

    def _load(self, index: int) -> np.ndarray:
        return load_photo(self.evaluation.photo_file(index))

    # ── Answers ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _check_models(self) -> None:
        """Raise EvaluationStopped if a model no longer exists."""
        for model in self.config.models:
            if model.name not in self.access.specs:
                raise EvaluationStopped(f"The model {model.title or model.name} is no longer available.")

    def _answer_all(self, count: int, scoring: ThreadPoolExecutor) -> None:
        """Let the models answer all photos that have no answer yet. Answers with an error are requested again."""
        done = {key for key, row in self.evaluation.rows().items() if not row.get("error")}
        total, self.done, first = count * len(self.config.models), len(done), len(done)
        self.started = time.monotonic()
        pool_seconds = self._pool_seconds()

        def report() -> None:
            elapsed = time.monotonic() - self.started
            left = elapsed / max(1, self.done - first) * (total - self.done)
            self._report("answering", self.done, total, left + pool_seconds)

        pending: deque[Future[int]] = deque()
        with ThreadPoolExecutor(HOSTED_CALLS * len(self.config.models)) as calls:
            for start in range(0, count, CHUNK):
                photos = {index: self._load(index) for index in range(start, min(start + CHUNK, count))}
                for answered in self._answer_chunk(photos, done, count, calls):
                    images = [photos[item.photo] for item in answered]
                    pending.append(scoring.submit(self._score_and_store, answered, images))
                    while len(pending) > 2 * len(self.config.models):  # keeps memory flat
                        self.done += pending.popleft().result()
                        report()
            while pending:
                self.done += pending.popleft().result()
                report()

    def _pool_seconds(self) -> float:
        """Estimate the seconds that the reference recipes take for photos whose scores are not known."""
        if not self.config.is_scored:
            return 0.0
        digests = [photo["digest"] for photo in self.evaluation.photos() or []]
        unknown = [digest for digest in digests if not (self.cache_folder and self._cache_file(digest).exists())]
        return len(unknown) * POOL_SECONDS * self.config.pool / 256 / self.workers

    def _answer_chunk(
        self, photos: Mapping[int, np.ndarray], done: set[tuple[int, int]], count: int, calls: ThreadPoolExecutor
    ) -> Iterator[list[_Answered]]:
        """Yield the answers of all models to a chunk of photos, as they come."""
        hosted = []
        for model, settings in enumerate(self.config.models):
            if self.access.specs[settings.name].backend != "local":
                todo = [photo for photo in photos if (photo, model) not in done]
                hosted += [calls.submit(self._answer_one, photo, photos[photo], model) for photo in todo]
        failure: Exception | None = None
        try:
            for model, settings in enumerate(self.config.models):
                spec = self.access.specs[settings.name]
                if spec.backend == "local":
                    todo = [photo for photo in photos if (photo, model) not in done]
                    for batch in self._batches(todo, spec, count):
                        yield self._answer_batch(batch, [photos[photo] for photo in batch], model)
        except (InferenceError, EvaluationStopped) as error:
            failure = error
        for future in as_completed(hosted):  # also after a failure: answers that were paid for are kept
            if failure:
                for other in hosted:
                    other.cancel()
            try:
                yield [future.result()]
            except CancelledError:
                continue
            except (InferenceError, EvaluationStopped) as error:
                failure = failure or error
        if failure:
            raise failure

    def _batches(self, photos: Sequence[int], spec: ModelSpec, count: int) -> list[list[int]]:
        """Divide photos into batches. A few photos stay alone."""
        every = max(MIN_ALONE_EVERY, count // ALONE_PHOTOS)
        alone = [photo for photo in photos if photo % every == every // 2]
        together = [photo for photo in photos if photo not in alone]
        size = max(1, (LARGE_MODEL_ROWS if spec.memory_bytes else BATCH_ROWS) // self.config.candidates)
        batches = [together[start : start + size] for start in range(0, len(together), size)]
        return [[photo] for photo in alone] + batches

    def _request(self, image: np.ndarray, model: int) -> Request:
        config = self.config
        temperature = config.models[model].temperature
        return Request(image, config.skill, config.prompt, "normal", config.candidates, temperature, config.seed)

    def _answer_batch(self, photos: Sequence[int], images: Sequence[np.ndarray], model: int) -> list[_Answered]:
        """Let a local model answer photos as one batch; if that fails, one by one."""
        self._check_cancelled()
        spec = self.access.specs[self.config.models[model].name]
        requests = [self._request(image, model) for image in images]
        if len(photos) > 1:
            try:
                batches = answer_batch(spec, requests, self.cancel)
            except InferenceError as error:
                if error.kind == "cancelled" or error.kind in FATAL_ERRORS:
                    raise
            else:  # the batch's time is divided, so that the usage events add up to the time of the machine
                count = len(photos)
                return [
                    self._track(photo, request, model, _replay(answers, count), count)
                    for photo, request, answers in zip(photos, requests, batches)
                ]
        return [self._answer_one(photo, image, model) for photo, image in zip(photos, images)]

    def _answer_one(self, photo: int, image: np.ndarray, model: int) -> _Answered:
        self._check_cancelled()
        return self._track(photo, self._request(image, model), model, self.access.answer)

    def _track(self, photo: int, request: Request, model: int, function: AnswerFunction, batch: int = 1) -> _Answered:
        """Run a model by a function, with one usage event.

        Raises:
            InferenceError: If it was cancelled, or if it would fail for the other photos as well.
            EvaluationStopped: If the model has failed for too many photos in a row.
        """
        name, answers, error = self.config.models[model].name, [], ""
        tracker = CallTracker(self.access.meter, request, function, SOURCE, self.access.session, "", self.access.payer)
        self.open.add(tracker)
        try:
            for event in tracker.answer(name, request, self.cancel):
                if isinstance(event, Answer):
                    answers.append(event)
                elif isinstance(event, CandidateFailed):
                    error = event.message
        except InferenceError as failure:
            if failure.kind == "cancelled" or failure.kind in FATAL_ERRORS:
                raise
            error = failure.message
        with self._lock:
            self.failures[model] = self.failures[model] + 1 if not answers else 0
            if self.failures[model] >= MAX_FAILURES:
                title = self.config.models[model].label
                raise EvaluationStopped(f"{title} failed for {MAX_FAILURES} photos in a row. The last error: {error}")
        return _Answered(photo, model, sorted(answers, key=lambda item: item.index), tracker, batch, error)

    # ── Scores ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _score_and_store(self, answered: Sequence[_Answered], images: Sequence[np.ndarray]) -> int:
        """Score answers and append them to the folder. Returns their number."""
        rows = [self._row(item, image) for item, image in zip(answered, images)]
        with self._lock:
            self.evaluation.append_rows(rows)
        return len(rows)

    def _row(self, item: _Answered, image: np.ndarray) -> dict[str, Any]:
        name = self.config.models[item.model].name
        row: dict[str, Any] = {
            "photo": item.photo,
            "model": item.model,
            "texts": [answer.text for answer in item.answers],
            "batch": item.batch,
        }
        reward = None
        if self.config.is_scored:
            parsed = [parse(answer.text) for answer in item.answers]
            recipes = [result.recipe if result.ok else Recipe() for result in parsed]
            row["untouched"], *row["scores"] = _rounded(score_each(image, [Recipe(), *recipes]))
            row["recipes"] = [str(result.recipe) if result.ok else None for result in parsed]
            row["valid"] = sum(result.ok for result in parsed) / self.config.candidates
            totals = [self.config.function.total(dict(zip(REWARDS, values))) for values in row["scores"]]
            known = [total for total in totals if total is not None]
            reward = sum(known) / len(known) if known else None
        elif item.answers:
            row["valid"] = sum(_is_usable(answer, self.config.skill) for answer in item.answers) / (
                self.config.candidates
            )
            if SKILLS[self.config.skill].output == "regions":
                row["regions"] = [_regions(answer) for answer in item.answers]
        else:
            row["valid"] = 0.0
        usage = item.tracker.usage(name)
        if usage is not None:
            row |= {"seconds": round(usage.latency, 4), "cost": usage.cost}
            row |= {"tokens_in": usage.tokens_in, "tokens_out": usage.tokens_out}
        item.tracker.record_reward(name, reward)
        item.tracker.close()
        self.open.discard(item.tracker)
        return row | ({"error": item.error} if item.error else {})

    def _score_references(self, photos: Sequence[Mapping[str, Any]], scoring: ThreadPoolExecutor) -> None:
        """Score the random recipes on every photo, or read the scores that an earlier evaluation has computed."""
        recipes = random_recipes(self.config.pool)
        scores = self.evaluation.references((len(photos), len(recipes), len(REWARDS)))
        cached = {index: self._cached(photos[index]["digest"]) for index in range(len(photos))}
        for index, values in cached.items():
            if values is not None and len(values) >= len(recipes):
                scores[index] = values[: len(recipes)]
        todo = [index for index in range(len(photos)) if np.isnan(scores[index]).all()]
        started, saved = time.monotonic(), time.monotonic()

        def score(index: int) -> tuple[int, np.ndarray | None]:
            if self.cancel.is_set():
                return index, None
            return index, score_each(self._load(index), recipes).astype(np.float32)

        for number, (index, values) in enumerate(scoring.map(score, todo), 1):
            self._check_cancelled()
            if values is not None:
                scores[index] = values
                self._cache(photos[index]["digest"], values)
            if time.monotonic() - saved > 10:
                self._save_references(scores)
                saved = time.monotonic()
            left = (time.monotonic() - started) / number * (len(todo) - number)
            self._report("scoring the reference recipes", len(photos) - len(todo) + number, len(photos), left)
        self._save_references(scores)

    def _save_references(self, scores: np.ndarray) -> None:
        buffer = io.BytesIO()
        np.save(buffer, scores)
        write_atomically(self.evaluation.folder / "references.npy", buffer.getvalue())

    def _cached(self, digest: str) -> np.ndarray | None:
        try:
            return np.load(self._cache_file(digest)) if self.cache_folder else None
        except (OSError, ValueError):
            return None

    def _cache(self, digest: str, values: np.ndarray) -> None:
        if self.cache_folder and len(values) == 256:
            self._cache_file(digest).parent.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            np.save(buffer, values)
            write_atomically(self._cache_file(digest), buffer.getvalue())

    def _cache_file(self, digest: str) -> Path:
        assert self.cache_folder is not None
        return self.cache_folder / _scoring_version() / f"{digest}.npy"

    # ── Progress ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _check_cancelled(self) -> None:
        if self.cancel.is_set() or self.evaluation.cancelled:
            self.cancel.set()
            raise InferenceError("cancelled", CANCELLED)

    def _report(self, phase: str, step: int, steps: int, seconds_left: float) -> None:
        """Write the progress to the status, at most twice a second."""
        now = time.monotonic()
        if now - self._status_time >= STATUS_SECONDS or step == steps:
            self._status_time = now
            eta = time.time() + seconds_left if seconds_left else 0.0
            self.evaluation.set_status(phase=phase, step=step, steps=steps, eta=eta)


def _replay(answers: Sequence[Answer], count: int) -> AnswerFunction:
    """Return a function that yields these answers to one of `count` photos of a batch, with its share of the time."""
    shared = [replace(answer, seconds=answer.seconds / count) for answer in answers]
    return lambda name, request, cancel: iter(shared)


def _is_usable(answer: Answer, skill: str) -> bool:
    """Whether an answer has a text or regions, and was not cut off."""
    if SKILLS[skill].output == "regions":
        return bool(answer.boxes or answer.points or answer.path)
    return bool(answer.text.strip()) and not answer.truncated


def _regions(answer: Answer) -> dict[str, Any]:
    boxes = [[box.x_min, box.y_min, box.x_max, box.y_max] for box in answer.boxes]
    return {"boxes": boxes, "points": [[point.x, point.y] for point in answer.points]}


def _rounded(scores: np.ndarray) -> list[list[float | None]]:
    """Return scores as lists for JSON, NaN as None."""
    return [[None if np.isnan(value) else round(float(value), 6) for value in row] for row in scores]


@cache
def _scoring_version() -> str:
    """Return a digest of the code that renders and scores recipes: cached scores of other code do not count."""
    root = Path(__file__).resolve().parents[2]
    files = sorted([*(root / "rewards").glob("*.py"), *(root / "recipes").glob("*.py")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _lower_priority() -> None:
    """Let a scoring thread give way to everything else."""
    if sys.platform == "linux":  # elsewhere this would slow down the whole process
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
