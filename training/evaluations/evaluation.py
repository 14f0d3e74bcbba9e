"""An evaluation as a folder: config, status, photos and answers with their scores. Imports no torch.

Beside config.json, status.json, owner.json, cancel and lock, which are those of a run, the folder holds:

    photos.json      name and digest of each photo, written once all photos are copied
    photo-N.jpg      the photos, at preview size
    answers.jsonl    one row per photo and model: answers, recipes, scores by reward, time, tokens, cost
    references.npy   scores of 256 random recipes per photo, float32 [photos, recipes, rewards]
    scores.parquet   the same scores as a table, one row per photo, model and candidate
    result.json      the leaderboard with the rewards of the config
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from inference.types import MAX_CANDIDATES, MAX_PROMPT, MAX_SEED, MAX_TEMPERATURE, SKILLS
from rewards import REWARDS, RewardFunction, RewardFunctionError
from storage.files import write_atomically
from training.runs.run import MAX_NAME, MAX_PHOTOS, Ownership, Run, RunError, RunStore, format_errors, read_jsonl

MAX_MODELS = 6
POOL_SIZE = 256  # random recipes per photo
DEFAULT_PHOTOS, DEFAULT_CANDIDATES = 100, 4
_cache_lock = threading.Lock()


class EvaluatedModel(BaseModel):
    """A model with the temperature at which it is evaluated.

    Attributes:
        name: A name in MODELS, or for the command a run's folder.
        temperature: Sampling temperature; at 0 all candidates are equal.
        title: Display name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(min_length=1, max_length=500)
    temperature: float = Field(1.0, ge=0, le=MAX_TEMPERATURE)
    title: str = Field("", max_length=200)

    @property
    def label(self) -> str:
        """Title and temperature, which identify the model within an evaluation."""
        return f"{self.title or Path(self.name).name}, T {self.temperature:g}"


class EvaluationConfig(BaseModel):
    """Settings of an evaluation; unknown keys are refused.

    Attributes:
        models: One to six models, each pair of name and temperature once.
        photos: "bundled" (the held-out ones), a folder, a zip file, or "hub:owner/dataset".
        reward: Weight of each reward by name, 0 to 1, of the first leaderboard.
        skill: Key of the skill in SKILLS. Only recipes are scored.
        prompt: The prompt.
        candidates: Answers per photo and model.
        max_photos: Maximum number of photos; of a larger set a random sample is taken.
        seed: Seed of the answers and of the sample.
        degraded: Seed with which each photo is degraded at random first; None leaves the photos alone.
        pool: Random recipes per photo, the best of which is a reference.
        name: Display name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    models: tuple[EvaluatedModel, ...] = Field(min_length=1, max_length=MAX_MODELS)
    reward: dict[str, float]
    photos: str = Field("bundled", min_length=1, max_length=500)
    skill: Literal["recipe", "query", "caption", "detect", "point", "segment"] = "recipe"
    prompt: str = Field("", max_length=MAX_PROMPT)
    candidates: int = Field(DEFAULT_CANDIDATES, ge=1, le=MAX_CANDIDATES)
    max_photos: int = Field(DEFAULT_PHOTOS, ge=1, le=MAX_PHOTOS)
    seed: int = Field(1, ge=0, le=MAX_SEED - MAX_CANDIDATES)
    degraded: int | None = Field(None, ge=0, le=MAX_SEED)
    pool: int = Field(POOL_SIZE, ge=0, le=POOL_SIZE)
    name: str = Field("", max_length=MAX_NAME)

    @field_validator("models")
    @classmethod
    def _check_models(cls, models: tuple[EvaluatedModel, ...]) -> tuple[EvaluatedModel, ...]:
        if len({(model.name, model.temperature) for model in models}) < len(models):
            raise ValueError("a model may appear twice only with another temperature")
        return models

    @field_validator("reward")
    @classmethod
    def _check_reward(cls, weights: dict[str, float]) -> dict[str, float]:
        try:
            return dict(RewardFunction(weights).weights)
        except RewardFunctionError as error:
            raise ValueError(str(error)) from None

    @property
    def function(self) -> RewardFunction:
        """The reward weights as a reward function."""
        return RewardFunction(self.reward)

    @property
    def is_scored(self) -> bool:
        """Whether the answers are recipes, which rewards score."""
        return SKILLS[self.skill].output == "recipe"

    @classmethod
    def create(cls, **values: Any) -> EvaluationConfig:
        """Build a config from keyword arguments. Raises RunError with a message that names each invalid value."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise RunError(f"The evaluation cannot be started: {format_errors(error)}.") from None


@dataclass(frozen=True)
class Results:
    """The answers and scores of an evaluation so far.

    P photos, M models, N candidates, R rewards. Missing values are NaN.

    Attributes:
        config: The settings.
        photos: Name, digest and more of each photo; see `Evaluation.photos`.
        rows: The row of answers.jsonl by photo and model.
        scores: float64 [P, M, N, R].
        valid: Share of usable answers, float64 [P, M].
        seconds: Time of a call for one photo, float64 [P, M]; NaN for photos that shared a batch.
        tokens_in: Input tokens per photo, float64 [P, M]; `tokens_out` likewise.
        cost: US dollars per photo, float64 [P, M].
        untouched: Scores of the photos themselves, float64 [P, R]; NaN before the first answer to a photo.
        pool: Scores of random recipes, float64 [P, recipes, R].
    """

    config: EvaluationConfig
    photos: list[dict[str, Any]]
    rows: dict[tuple[int, int], dict[str, Any]]
    scores: np.ndarray
    valid: np.ndarray
    seconds: np.ndarray
    tokens_in: np.ndarray
    tokens_out: np.ndarray
    cost: np.ndarray
    untouched: np.ndarray
    pool: np.ndarray


class Evaluation(Run):
    """An evaluation's folder. Writes are atomic, or append whole lines; reads tolerate incomplete files."""

    def config(self) -> EvaluationConfig:  # type: ignore[override]
        """Read the settings. Raises RunError."""
        try:
            return EvaluationConfig.model_validate_json((self.folder / "config.json").read_bytes())
        except OSError:
            raise RunError(f"{self.folder.name} is not an evaluation: it has no config.json.") from None
        except ValidationError as error:
            raise RunError(f"The evaluation's config cannot be used: {format_errors(error)}.") from None

    def status(self) -> Any:
        """Read the status. An evaluation marked as running without a live process is `interrupted`."""
        status = super().status()
        if status.state == "interrupted" and not status.ended:
            status = replace(status, message="The application ended meanwhile. Resume the evaluation.")
        return status

    def rename(self, name: str) -> None:
        """Change the display name. Raises RunError or OSError."""
        config = EvaluationConfig.create(**{**self.config().model_dump(), "name": name.strip()})
        write_atomically(self.folder / "config.json", config.model_dump_json(indent=1))

    def lock(self) -> FileLock:
        """Return the lock that is held while the evaluation works."""
        return FileLock(self.folder / "lock", timeout=0)

    def photos(self) -> list[dict[str, Any]] | None:
        """Read name and digest of each photo; None until all photos are copied."""
        try:
            return json.loads((self.folder / "photos.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def photo_file(self, index: int) -> Path:
        """Return the file of a photo."""
        return self.folder / f"photo-{index}.jpg"

    def rows(self) -> dict[tuple[int, int], dict[str, Any]]:
        """Read the answers by index of the photo and of the model. A later row replaces an earlier one."""
        rows = {}
        for row in read_jsonl(self.folder / "answers.jsonl"):
            if isinstance(row.get("photo"), int) and isinstance(row.get("model"), int):
                rows[row["photo"], row["model"]] = row
        return rows

    def append_rows(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append answers as whole lines. Raises OSError."""
        with open(self.folder / "answers.jsonl", "a+b") as file:
            if file.tell() and _last_byte(file) != b"\n":  # a killed process left part of a line
                file.write(b"\n")
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())

    def references(self, shape: tuple[int, int, int]) -> np.ndarray:
        """Read the scores of the random recipes, float32 of this shape; NaN where they are not computed yet."""
        try:
            scores = np.load(self.folder / "references.npy")
            if scores.shape == shape:
                return scores
        except (OSError, ValueError):
            pass
        return np.full(shape, np.nan, np.float32)

    def results(self) -> Results:
        """Read everything that was answered so far. Raises RunError."""
        names = ("config.json", "photos.json", "answers.jsonl", "references.npy")
        with _cache_lock:
            return _read_results(self.folder, tuple(_version(self.folder / name) for name in names))


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def _version(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=4)
def _read_results(folder: Path, _: tuple[Any, ...]) -> Results:
    """Read the results of a folder; the second argument is the version of its files."""
    evaluation = Evaluation(folder)
    config, photos, rows = evaluation.config(), evaluation.photos() or [], evaluation.rows()
    shape, count = (len(photos), len(config.models)), len(REWARDS)
    scores = np.full((*shape, config.candidates, count), np.nan)
    columns = {name: np.full(shape, np.nan) for name in ("valid", "seconds", "tokens_in", "tokens_out", "cost")}
    rows = {key: row for key, row in rows.items() if key[0] < shape[0] and key[1] < shape[1]}
    unknown = [None] * count
    untouched = np.array([photo.get("untouched") or unknown for photo in photos], np.float64).reshape(-1, count)
    for key, row in rows.items():
        if "untouched" in row:  # else in photos.json, by earlier versions
            untouched[key[0]] = row["untouched"]
        scored = row.get("scores") or []
        if scored:
            scores[key][: len(scored)] = scored
        for name, column in columns.items():
            if row.get(name) is not None and (name != "seconds" or row.get("batch", 1) == 1):
                column[key] = row[name]
    pool = evaluation.references((len(photos), config.pool, count)).astype(np.float64)
    return Results(config, photos, rows, scores, untouched=untouched, pool=pool, **columns)


class EvaluationStore(RunStore):
    """The evaluations in a folder."""

    noun = "evaluation"

    def create(  # type: ignore[override]
        self, config: EvaluationConfig, owner: str = "", owner_name: str = "", own_key: bool = False
    ) -> Evaluation:
        """Create a queued evaluation. Raises RunError; arguments are as for `RunStore.create`."""
        return Evaluation(self._create(config, 0, Ownership(owner, owner_name, own_key)))

    def list(self) -> list[Evaluation]:  # type: ignore[override]
        """List the evaluations, oldest first."""
        return [Evaluation(run.folder) for run in super().list()]

    def get(self, name: str) -> Evaluation:
        """Return the evaluation with this id. Raises RunError."""
        return Evaluation(super().get(name).folder)


def create_folder(folder: Path, config: EvaluationConfig) -> Evaluation:
    """Create an evaluation in a folder of its own, or open the one that is there to resume it.

    Raises:
        RunError: The folder has other files, or an evaluation with other settings.
    """
    evaluation = Evaluation(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "config.json").exists():
            if evaluation.config().model_copy(update={"reward": config.reward}) != config:
                raise RunError(f"{folder} has an evaluation with other settings. Choose another folder.")
        elif any(folder.iterdir()):
            raise RunError(f"{folder} is not empty. Choose another folder.")
        write_atomically(folder / "config.json", config.model_dump_json(indent=1))
    except OSError as error:
        raise RunError(f"The folder {folder} cannot be written ({error.strerror}).") from None
    return evaluation


def acquire(evaluation: Evaluation) -> FileLock:
    """Acquire the lock of an evaluation. Raises RunError if another process works on it."""
    lock = evaluation.lock()
    try:
        lock.acquire()
    except Timeout:
        raise RunError("Another process works on this evaluation.") from None
    return lock
