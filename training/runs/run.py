"""Runs: a training run is a folder. Its settings, its state, what it wrote, and whether it still works. No torch here.

A run's folder holds
    config.json     RunConfig: what was asked
    status.json     Status: where it stands, replaced as a whole at each change
    metrics.jsonl   one line per logged step
    probes.jsonl    what the model answers to the same few photos, every few steps
    log.txt         what the training process printed
    checkpoint-N/   to go on from
    adapter/        what was learned, in PEFT's layout
    result.json     base and tuned on held-out photos
    job.json        the job that does it, when it works on Hugging Face Jobs
    hosted.json     the finetune and its step, when it works on Moondream's tuning API
    reward.png      the curve
    cancel          asks the process to stop at its next step
    lock            held by the process while it lives: a killed process leaves it free
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rewards import RewardFunction, RewardFunctionError

State = Literal["queued", "running", "done", "cancelled", "failed", "interrupted"]
WHERE = ("here", "jobs", "hosted")
OVER = ("done", "cancelled", "failed", "interrupted")
MAX_RUNS = 50
MAX_STEPS = 2_000
MAX_PHOTOS = 1_000
MAX_NAME = 80
LOG_TAIL = 64 * 1024  # bytes of a log that are read at most
_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}")


class RunError(Exception):
    """Something cannot be done with a run; the message says why and what to do."""


class RunAborted(Exception):
    """A run cannot go on; the message says why and what to do."""


class RunConfig(BaseModel):
    """What a run is asked to do. `base`, `reward` and `seed` are enough; keys that are not known are refused.

    base: a name in MODELS, or the folder of another run, whose adapter is trained further.
    reward: weights 0..1 by reward. photos, held_out: "bundled", a folder, a zip file, or "hub:owner/dataset".
    steps: updates, unless `epochs` (passes over the photos) is given. photos_per_step x rollouts answers are scored per
    step. temperature: of the rollouts. beta: weight of the KL divergence to the base. rank: of the LoRA adapter.
    where: on this machine; on Hugging Face Jobs, there on `hardware`; or "hosted" by Moondream's tuning API, there for
    at most `budget` US dollars, after `sft_steps` supervised steps that show the form of a recipe.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    base: str = Field(min_length=1, max_length=500)
    reward: dict[str, float]
    seed: int = Field(ge=0, le=2**31 - 1)
    name: str = Field("", max_length=MAX_NAME)
    photos: str = Field("bundled", min_length=1, max_length=500)
    held_out: str = Field("bundled", min_length=1, max_length=500)
    max_photos: int = Field(200, ge=1, le=MAX_PHOTOS)
    steps: int = Field(140, ge=1, le=MAX_STEPS)
    epochs: float | None = Field(None, gt=0, le=1_000)
    photos_per_step: int = Field(4, ge=1, le=64)
    rollouts: int = Field(8, ge=2, le=32)
    learning_rate: float = Field(3e-3, gt=0, le=1)
    beta: float = Field(0.01, ge=0, le=10)
    temperature: float = Field(1.0, gt=0, le=2)
    rank: int = Field(16, ge=1, le=256)
    save_every: int = Field(25, ge=1, le=MAX_STEPS)
    probe_every: int = Field(10, ge=1, le=MAX_STEPS)
    where: Literal["here", "jobs", "hosted"] = "here"
    hardware: str = Field("l4x1", pattern="^[a-z0-9-]{1,40}$")
    budget: float | None = Field(None, gt=0, le=10_000)
    sft_steps: int = Field(0, ge=0, le=200)

    @field_validator("reward")
    @classmethod
    def _known_rewards(cls, weights: dict[str, float]) -> dict[str, float]:
        try:
            return {name: weight for name, weight in RewardFunction(weights).weights.items() if weight}
        except RewardFunctionError as error:
            raise ValueError(str(error)) from None

    @property
    def reward_function(self) -> RewardFunction:
        """The weights as the function that scores."""
        return RewardFunction(self.reward)

    @classmethod
    def read(cls, text: str | bytes) -> RunConfig:
        """From JSON. Raises RunError, whose message names each key that is wrong."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise RunError(f"The run's config cannot be used: {_complaints(error)}.") from None

    @classmethod
    def make(cls, **values: Any) -> RunConfig:
        """From keywords. Raises RunError, whose message names each value that is wrong."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise RunError(f"A run cannot be started like this: {_complaints(error)}.") from None


@dataclass(frozen=True)
class Status:
    """Where a run stands. phase: in words, what is being done. step, steps: updates done, and asked for.

    created, started, ended: seconds since 1970, 0 before it happens. message: why it failed, or what to know.
    """

    state: State = "queued"
    phase: str = ""
    step: int = 0
    steps: int = 0
    created: float = 0.0
    started: float = 0.0
    ended: float = 0.0
    message: str = ""

    @property
    def over(self) -> bool:
        return self.state in OVER

    def seconds_left(self, now: float | None = None) -> float | None:
        """A guess at the time left, from the steps so far; None where there is nothing to guess from."""
        if self.state != "running" or not self.step:
            return None
        spent = (time.time() if now is None else now) - self.started
        return max(0.0, spent / self.step * (self.steps - self.step))


class Run:
    """One run's folder. Every write is whole or not there; every read takes what is there."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def adapter(self) -> Path:
        """Where what was learned is, once there is any."""
        return self.folder / "adapter"

    @property
    def has_adapter(self) -> bool:
        return (self.adapter / "adapter_model.safetensors").is_file()

    @property
    def has_model(self) -> bool:
        """Whether there is something to ask: an adapter here, or a checkpoint on the server that trained it."""
        return self.has_adapter or bool((self.result() or {}).get("model"))

    def config(self) -> RunConfig:
        """What was asked. Raises RunError."""
        try:
            return RunConfig.read((self.folder / "config.json").read_bytes())
        except OSError:
            raise RunError(f"{self.folder.name} is no run: it has no config.json.") from None

    def status(self) -> Status:
        """Where it stands. A run that says that it works, but whose process has gone, is `interrupted`."""
        status = self._written_status()
        if status.state == "running" and not self.alive():
            again = self._written_status()  # it may have ended between the two looks
            if again.state == "running":
                return replace(again, state="interrupted", message="Its process ended before it was done. Resume it.")
            return again
        return status

    def _written_status(self) -> Status:
        try:
            return Status(**json.loads((self.folder / "status.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return Status()

    def alive(self) -> bool:
        """Whether a process works on it now."""
        lock = FileLock(self.folder / "lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return True
        except OSError:
            return False
        lock.release()
        return False

    def set_status(self, **changes: Any) -> Status:
        """Changes what is written of its state. Raises OSError."""
        status = replace(self._written_status(), **changes)
        write_whole(self.folder / "status.json", json.dumps(asdict(status)))
        return status

    def cancel(self) -> None:
        """Asks it to stop at its next step; what it has learned is kept. A run that has not begun will not."""
        (self.folder / "cancel").touch()
        if self._written_status().state == "queued":
            self.set_status(state="cancelled", ended=time.time(), message="Cancelled before it began.")

    @property
    def cancelled(self) -> bool:
        return (self.folder / "cancel").exists()

    def metrics(self) -> list[dict[str, Any]]:
        """The logged steps in their order."""
        return list(_lines(self.folder / "metrics.jsonl"))

    def probes(self) -> list[dict[str, Any]]:
        """The probe answers in their order: step, photo, recipe, scores, total."""
        return list(_lines(self.folder / "probes.jsonl"))

    def add(self, kind: Literal["metrics", "probes"], line: dict[str, Any]) -> None:
        """Adds a line to metrics or probes. Raises OSError."""
        with open(self.folder / f"{kind}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def forget_after(self, step: int) -> None:
        """Drops the lines of later steps, which a resumed run writes again."""
        for kind in ("metrics", "probes"):
            file = self.folder / f"{kind}.jsonl"
            kept = [line for line in _lines(file) if line.get("step", 0) <= step]
            write_whole(file, "".join(json.dumps(line) + "\n" for line in kept))

    def result(self) -> dict[str, Any] | None:
        """What came out; None before."""
        try:
            return json.loads((self.folder / "result.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def log(self, lines: int = 200) -> str:
        """The last lines of the log."""
        try:
            with open(self.folder / "log.txt", "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
        return "\n".join(text.replace("\r", "\n").splitlines()[-lines:])

    def rename(self, name: str) -> None:
        """Gives it another name. Raises RunError."""
        config = RunConfig.make(**{**self.config().model_dump(), "name": name.strip()})
        write_whole(self.folder / "config.json", config.model_dump_json(indent=1))


def _new_id() -> str:
    """A name whose order is that of time, to the microsecond, in UTC: no clock is put back in it."""
    now = datetime.now(timezone.utc)
    return f"{now:%Y%m%d-%H%M%S}-{now.microsecond:05x}{secrets.token_hex(1)[0]}"


class Runs:
    """All runs in a folder, oldest first."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def create(self, config: RunConfig) -> Run:
        """A new run, queued. Raises RunError when too many are kept, or the disk does not take it."""
        if len(self.list()) >= MAX_RUNS:
            raise RunError(f"{MAX_RUNS} runs are kept, which is the limit. Delete one first.")
        run = Run(self.folder / _new_id())
        part = run.folder.with_name(f".{run.id}")
        try:
            part.mkdir(parents=True)
            write_whole(part / "config.json", config.model_dump_json(indent=1))
            Run(part).set_status(steps=config.steps, created=time.time())
            os.replace(part, run.folder)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            raise RunError(f"The run's folder could not be written ({error.strerror}). Free some space.") from None
        return run

    def list(self) -> list[Run]:
        """The runs, oldest first."""
        try:
            names = sorted(entry.name for entry in os.scandir(self.folder) if _ID.fullmatch(entry.name))
        except OSError:
            return []
        return [Run(self.folder / name) for name in names]

    def get(self, name: str) -> Run:
        """The run with this id. Raises RunError."""
        if not isinstance(name, str) or not _ID.fullmatch(name) or not (self.folder / name).is_dir():
            raise RunError(f"There is no run {str(name)[:40]!r} (any more).")
        return Run(self.folder / name)

    def delete(self, name: str) -> None:
        """Removes a run with all that it learned. Raises RunError while it works."""
        run = self.get(name)
        if run.alive():
            raise RunError("This run is still working. Cancel it first.")
        gone = run.folder.with_name(f".{run.id}.gone")  # one step, so that nobody meets half a run
        os.replace(run.folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old one or the new one. Raises OSError and leaves the old one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of JSON in a file; half a line at the end of a killed process is left out."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def _complaints(error: ValidationError) -> str:
    """What pydantic found, in a line without the values: they may be long, or no text at all."""
    found = []
    for problem in error.errors(include_url=False, include_input=False)[:6]:
        where = ".".join(str(part) for part in problem["loc"]) or "it"
        unknown = problem["type"] == "extra_forbidden"
        found.append(
            f"{where[:80]}: {'there is no such key' if unknown else problem['msg'].removeprefix('Value error, ')}"
        )
    return "; ".join(found)
