"""Training runs as folders: config, status, metrics, log and results of one run, and the store of all runs.

Imports no torch. A run's folder holds:

    config.json     RunConfig
    status.json     Status, replaced atomically at each change
    owner.json      Ownership: who started the run; part of no export and no upload
    metrics.jsonl   one row per logged step
    probes.jsonl    the model's answers to a fixed set of held-out photos, every few steps
    rollouts.jsonl  the rollouts of each logged step, with rollout-photo-N.jpg of the photos they answer
    alarms.json     signs that the reward rises although the pictures do not get better, with alarm-*.jpg
    log.txt         output of the training process
    checkpoint-N/   checkpoints to resume from
    adapter/        the trained LoRA adapter in PEFT's layout
    result.json     scores of the base and the tuned model on held-out photos
    job.json        the job that executes the run on Hugging Face Jobs
    hosted.json     the finetune and its step on Moondream's tuning API
    calls.jsonl     one row per paid call to Moondream's tuning API
    reward.png      the reward curve
    cancel          asks the training process to stop at its next step
    lock            held by the training process while it lives; a killed process releases it
"""

from __future__ import annotations

import contextlib
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
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rewards import RewardFunction, RewardFunctionError
from storage.files import write_atomically

RunState = Literal["queued", "running", "done", "cancelled", "failed", "interrupted"]
BACKENDS = ("here", "jobs", "hosted")
GUEST_PREFIX = "guest:"  # of the owners that are guests; see `access.roles.Visitor`
FINISHED_STATES = ("done", "cancelled", "failed", "interrupted")
MAX_RUNS = 50
MAX_STEPS = 2_000
MAX_PHOTOS = 1_000
MAX_NAME = 80
PROBE_PHOTOS = 8  # held-out photos that the model answers during training
MAX_LOG_BYTES = 64 * 1024  # read from the end of a log
ALARM_KINDS = ("not_generalizing", "traded_part", "cut_subject", "at_limits", "repeated_answers", "no_signal")
TRASH_SUFFIX = ".gone"  # of the folder of a run that is being deleted
_ROLLOUT_STEP = re.compile(r'\{"step": ([0-9]+),')
_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}")


class RunError(Exception):
    """Raised when an operation on a run is refused. The message says why and what to do."""


class RunAborted(Exception):  # noqa: N818
    """Raised when a run cannot continue. The message says why and what to do."""


class RunPaused(RunAborted):
    """Raised when a run stops early, with its progress kept, until it is resumed. The message says when that helps."""


class RunConfig(BaseModel):
    """Settings of a training run. `base`, `reward` and `seed` are required; unknown keys are refused.

    Attributes:
        base: A name in MODELS, or the folder of another run whose adapter is trained further.
        reward: Weight of each reward by name, 0 to 1.
        seed: Seed of the random number generators.
        name: Display name.
        method: "grpo" trains on the reward, "dpo" on the choices in the folder `photos`; see training/preferences. The
            reward only judges the result of a DPO run.
        photos: Training photos: "bundled", a folder, a zip file, or "hub:owner/dataset".
        held_out: Held-out photos, given like `photos`.
        max_photos: Maximum number of training photos.
        steps: Number of updates. Ignored if `epochs` is set.
        epochs: Passes over the training photos.
        photos_per_step: Photos per update. Each step scores `photos_per_step * rollouts` answers.
        rollouts: Answers sampled per photo.
        learning_rate: Peak learning rate.
        beta: Weight of the KL divergence from the base model.
        temperature: Sampling temperature of the rollouts.
        rank: Rank of the LoRA adapter.
        save_every: Steps between checkpoints.
        probe_every: Steps between evaluations on the probe photos.
        backend: "here" (this machine), "jobs" (Hugging Face Jobs) or "hosted" (Moondream's tuning API). Its key in
            config.json is `where`; both names are accepted as input.
        hardware: Hardware flavor on Hugging Face Jobs.
        budget: Maximum cost of a hosted run, in US dollars.
        sft_steps: Supervised steps of a hosted run, before its first GRPO step, on example recipes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, serialize_by_alias=True)

    base: str = Field(min_length=1, max_length=500)
    reward: dict[str, float]
    seed: int = Field(ge=0, le=2**31 - 1)
    name: str = Field("", max_length=MAX_NAME)
    method: Literal["grpo", "dpo"] = "grpo"
    photos: str = Field("bundled", min_length=1, max_length=500)
    held_out: str = Field("bundled", min_length=1, max_length=500)
    max_photos: int = Field(200, ge=1, le=MAX_PHOTOS)
    steps: int = Field(120, ge=1, le=MAX_STEPS)
    epochs: float | None = Field(None, gt=0, le=1_000)
    photos_per_step: int = Field(8, ge=1, le=64)
    rollouts: int = Field(4, ge=2, le=32)
    learning_rate: float = Field(1.5e-3, gt=0, le=1)
    beta: float = Field(0.01, ge=0, le=10)
    temperature: float = Field(1.0, gt=0, le=2)
    rank: int = Field(16, ge=1, le=256)
    save_every: int = Field(25, ge=1, le=MAX_STEPS)
    probe_every: int = Field(10, ge=1, le=MAX_STEPS)
    backend: Literal["here", "jobs", "hosted"] = Field("here", serialization_alias="where")
    hardware: str = Field("l4x1", pattern="^[a-z0-9-]{1,40}$")
    budget: float | None = Field(None, gt=0, le=10_000)
    sft_steps: int = Field(0, ge=0, le=200)

    @model_validator(mode="before")
    @classmethod
    def _accept_where(cls, values: Any) -> Any:
        """Read `where` as `backend`; `backend` takes precedence if both are given."""
        if isinstance(values, dict) and "where" in values:
            values = dict(values)
            values.setdefault("backend", values.pop("where"))
        return values

    @model_validator(mode="after")
    def _check_method(self) -> RunConfig:
        if self.method == "dpo" and self.backend != "here":
            raise ValueError("DPO runs train on this machine only")
        return self

    @field_validator("reward")
    @classmethod
    def _validate_reward(cls, weights: dict[str, float]) -> dict[str, float]:
        try:
            return {name: weight for name, weight in RewardFunction(weights).weights.items() if weight}
        except RewardFunctionError as error:
            raise ValueError(str(error)) from None

    @property
    def reward_function(self) -> RewardFunction:
        """The reward weights as a reward function."""
        return RewardFunction(self.reward)

    @classmethod
    def from_json(cls, text: str | bytes) -> RunConfig:
        """Parse a config. Raises RunError with a message that names each invalid key."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise RunError(f"The run's config cannot be used: {format_errors(error)}.") from None

    @classmethod
    def create(cls, **values: Any) -> RunConfig:
        """Build a config from keyword arguments. Raises RunError with a message that names each invalid value."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise RunError(f"The run cannot be started: {format_errors(error)}.") from None


@dataclass(frozen=True)
class Status:
    """State and progress of a run.

    Attributes:
        state: Where the run is in its life cycle.
        phase: Description of the current activity.
        step: Updates done.
        steps: Updates planned.
        created: Unix time at which the run was created, 0 if unknown.
        started: Unix time at which the training process started, 0 before.
        ended: Unix time at which the run ended, 0 before.
        message: Reason for a failure, or a note for the user.
        eta: Unix time at which the work is expected to end, 0 if the process does not estimate it.
    """

    state: RunState = "queued"
    phase: str = ""
    step: int = 0
    steps: int = 0
    created: float = 0.0
    started: float = 0.0
    ended: float = 0.0
    message: str = ""
    eta: float = 0.0

    @property
    def finished(self) -> bool:
        """Whether the run has ended, successfully or not."""
        return self.state in FINISHED_STATES

    def seconds_left(self, now: float | None = None) -> float | None:
        """Estimate the remaining time from `eta`, or from the steps so far; None without a completed step."""
        if self.state != "running" or not self.step or not self.steps:
            return None
        now = time.time() if now is None else now
        if self.eta:
            return max(0.0, self.eta - now)
        return max(0.0, (now - self.started) / self.step * (self.steps - self.step))


@dataclass(frozen=True)
class Ownership:
    """Who started a run, and whose key pays for it.

    Attributes:
        owner: Identifies the visitor as in `access.roles.Visitor.id`; "" for the deployment's administrator, who also
            owns the runs of versions without owners.
        owner_name: Display name of the owner.
        own_key: Whether the run uses a key that the visitor entered. The key itself is never stored.
    """

    owner: str = ""
    owner_name: str = ""
    own_key: bool = False


class Run:
    """A run's folder. Writes are atomic; reads tolerate missing and incomplete files."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    @property
    def id(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter, which may not exist yet."""
        return self.folder / "adapter"

    @property
    def has_adapter(self) -> bool:
        """Whether the run has saved an adapter."""
        return (self.adapter / "adapter_model.safetensors").is_file()

    @property
    def has_model(self) -> bool:
        """Whether the tuned model can be used: from a local adapter, or a checkpoint on the tuning server."""
        return self.has_adapter or bool((self.result() or {}).get("model"))

    @property
    def ownership(self) -> Ownership:
        """The owner and whether a visitor's key pays. An unreadable file grants nothing: no owner, and own_key."""
        try:
            return Ownership(**json.loads((self.folder / "owner.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return Ownership()
        except (OSError, ValueError, TypeError):
            return Ownership(own_key=True)

    @property
    def owner(self) -> str:
        """Who started the run; "" for the deployment's administrator and for runs of versions without owners."""
        return self.ownership.owner

    @property
    def owner_name(self) -> str:
        """Display name of the owner, which may be empty."""
        return self.ownership.owner_name

    @property
    def own_key(self) -> bool:
        """Whether the run uses a key that the visitor entered, so that the deployment's key must not pay for it."""
        return self.ownership.own_key

    def set_ownership(self, ownership: Ownership) -> None:
        """Write who owns the run. Raises OSError."""
        write_atomically(self.folder / "owner.json", json.dumps(asdict(ownership)))

    def config(self) -> RunConfig:
        """Read the run's settings. Raises RunError."""
        try:
            return RunConfig.from_json((self.folder / "config.json").read_bytes())
        except OSError:
            raise RunError(f"{self.folder.name} is not a run: it has no config.json.") from None

    def status(self) -> Status:
        """Read the run's status. A run marked as running without a live process is `interrupted`."""
        status = self._read_status()
        if status.state == "running" and not self.alive():
            status = self._read_status()  # the run may have ended between the two checks
            if status.state == "running":
                message = "The training process ended early. Resume the run."
                return replace(status, state="interrupted", message=message)
        return status

    def _read_status(self) -> Status:
        try:
            return Status(**json.loads((self.folder / "status.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return Status()

    def alive(self) -> bool:
        """Whether a training process holds the run's lock."""
        if not (self.folder / "lock").exists():  # FileLock would create the folder of a deleted run again
            return False
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
        """Update fields of the stored status. Raises OSError."""
        status = replace(self._read_status(), **changes)
        write_atomically(self.folder / "status.json", json.dumps(asdict(status)))
        return status

    def mark_ended(self, state: RunState, message: str) -> None:
        """Store how the run ended, unless it was deleted or the disk is full: its queue checks runs again."""
        with contextlib.suppress(OSError):
            self.set_status(state=state, ended=time.time(), message=message)

    def cancel(self) -> None:
        """Ask the training process to stop at its next step, keeping what it learned. A queued run ends at once."""
        (self.folder / "cancel").touch()
        if self._read_status().state == "queued":
            self.set_status(state="cancelled", ended=time.time(), message="Cancelled before it started.")

    @property
    def cancelled(self) -> bool:
        """Whether cancellation was requested."""
        return (self.folder / "cancel").exists()

    def metrics(self) -> list[dict[str, Any]]:
        """Read the logged steps, oldest first."""
        return list(read_jsonl(self.folder / "metrics.jsonl"))

    def probes(self) -> list[dict[str, Any]]:
        """Read the probe answers, oldest first; each has step, photo, recipe, scores and total."""
        return list(read_jsonl(self.folder / "probes.jsonl"))

    def rollouts(self, step: int) -> dict[str, Any] | None:
        """Read the rollouts of the last recorded step up to `step`; see `training.grpo.callbacks.RunCallback`."""
        found = None
        with contextlib.suppress(OSError), open(self.folder / "rollouts.jsonl", encoding="utf-8") as file:
            for line in file:
                match = _ROLLOUT_STEP.match(line)
                if match and int(match[1]) <= step:
                    found = line
        try:
            return json.loads(found) if found else None
        except ValueError:
            return None

    @property
    def has_rollouts(self) -> bool:
        """Whether the run has recorded rollouts. Those of a job arrive when it ends; earlier versions recorded none."""
        return (self.folder / "rollouts.jsonl").is_file()

    def rollout_photo(self, index: int) -> Path:
        """Return the file of the small copy of a training photo; it may not exist."""
        return self.folder / f"rollout-photo-{index}.jpg"

    def append_rollouts(self, row: dict[str, Any]) -> None:
        """Append the rollouts of a step; the row starts with the step. Raises OSError."""
        self._append("rollouts.jsonl", row)

    def alarms(self) -> list[dict[str, Any]]:
        """Read the alarms so far, one per kind; see `training.grpo.alarms.Alarm`. Runs of earlier versions have none.

        The result has them as well: the log of a job, which brings them during training, may be incomplete.
        """
        try:
            rows = json.loads((self.folder / "alarms.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            rows = (self.result() or {}).get("alarms")
        rows = rows if isinstance(rows, list) else []
        return [row for row in rows if isinstance(row, dict) and row.get("kind") in ALARM_KINDS]

    def set_alarms(self, rows: list[dict[str, Any]]) -> None:
        """Replace the alarms. Raises OSError."""
        write_atomically(self.folder / "alarms.json", json.dumps(rows, indent=1))

    def alarm_pictures(self, kind: str) -> tuple[Path, Path]:
        """Return the files of an alarm's photo, before and after the model's recipe; they may not exist."""
        return self.folder / f"alarm-{kind}-before.jpg", self.folder / f"alarm-{kind}-after.jpg"

    @property
    def has_alarm(self) -> bool:
        """Whether an alarm was raised, during training or by the result. Such a run is not taken over by itself."""
        result = self.result() or {}
        earlier = "alarms" not in result and result.get("alarm")  # results of earlier versions have no list
        return bool(self.alarms() or earlier)

    def calls(self) -> list[dict[str, Any]]:
        """Read the paid calls of a hosted run, oldest first."""
        return list(read_jsonl(self.folder / "calls.jsonl"))

    def append_call(self, row: dict[str, Any]) -> None:
        """Append a paid call, before anything else is done with its answer. Raises OSError."""
        self._append("calls.jsonl", row)

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Append the metrics of a step. Raises OSError."""
        self._append("metrics.jsonl", row)

    def append_probe(self, row: dict[str, Any]) -> None:
        """Append a probe answer. Raises OSError."""
        self._append("probes.jsonl", row)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def truncate_after(self, step: int) -> None:
        """Remove metrics, probes, rollouts and alarms of steps after `step`; a resumed run writes them again."""
        for name in ("metrics.jsonl", "probes.jsonl", *(["rollouts.jsonl"] if self.has_rollouts else [])):
            rows = [row for row in read_jsonl(self.folder / name) if row.get("step", 0) <= step]
            write_atomically(self.folder / name, "".join(json.dumps(row) + "\n" for row in rows))
        if alarms := self.alarms():
            self.set_alarms([row for row in alarms if row.get("step", 0) <= step])

    def result(self) -> dict[str, Any] | None:
        """Read the run's result; None until there is one."""
        try:
            return json.loads((self.folder / "result.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def log(self, lines: int = 200) -> str:
        """Read the last lines of the log."""
        try:
            with open(self.folder / "log.txt", "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - MAX_LOG_BYTES))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
        return "\n".join(text.replace("\r", "\n").splitlines()[-lines:])

    def rename(self, name: str) -> None:
        """Change the display name. Raises RunError."""
        config = RunConfig.create(**{**self.config().model_dump(), "name": name.strip()})
        write_atomically(self.folder / "config.json", config.model_dump_json(indent=1))


class RunStore:
    """The runs in a folder."""

    noun = "run"  # in messages

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    @staticmethod
    def new_id() -> str:
        """Return an id for a new run. Ids sort by creation time, to the microsecond."""
        now = datetime.now(timezone.utc)
        return f"{now:%Y%m%d-%H%M%S}-{now.microsecond:05x}{secrets.token_hex(1)[0]}"

    @property
    def is_full(self) -> bool:
        """Whether the limit of runs is reached."""
        return len(self.list()) >= MAX_RUNS

    def create(
        self,
        config: RunConfig,
        owner: str = "",
        owner_name: str = "",
        own_key: bool = False,
        run_id: str | None = None,
    ) -> Run:
        """Create a queued run.

        Args:
            config: Its settings.
            owner: See `Ownership`.
            owner_name: See `Ownership`.
            own_key: See `Ownership`.
            run_id: An id from `new_id`; a new one by default.

        Raises:
            RunError: If the limit is reached or the folder cannot be written.
        """
        return Run(self._create(config, config.steps, Ownership(owner, owner_name, own_key), run_id))

    def _create(self, config: BaseModel, steps: int, ownership: Ownership, run_id: str | None = None) -> Path:
        """Create the folder of a queued run. Raises RunError."""
        if self.is_full:
            raise RunError(f"The limit of {MAX_RUNS} {self.noun}s is reached. Delete one first, or try again later.")
        folder = self.folder / (run_id or self.new_id())
        part = folder.with_name(f".{folder.name}")
        try:
            part.mkdir(parents=True)
            write_atomically(part / "config.json", config.model_dump_json(indent=1))
            Run(part).set_ownership(ownership)
            Run(part).set_status(steps=steps, created=time.time())
            os.replace(part, folder)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            raise RunError(
                f"Could not write the {self.noun}'s folder ({error.strerror}). Free some disk space."
            ) from None
        return folder

    def list(self) -> list[Run]:
        """List the runs, oldest first. A folder without a config is not a run."""
        try:
            names = sorted(entry.name for entry in os.scandir(self.folder) if is_run_id(entry.name))
        except OSError:
            return []
        return [Run(self.folder / name) for name in names if (self.folder / name / "config.json").is_file()]

    def get(self, name: str) -> Run:
        """Return the run with this id. Raises RunError."""
        if not is_run_id(name) or not (self.folder / name / "config.json").is_file():
            raise RunError(f"There is no {self.noun} {str(name)[:40]!r}. It may have been deleted.")
        return Run(self.folder / name)

    def delete(self, name: str) -> None:
        """Delete a run with everything it learned. Raises RunError if its process is alive, or on a disk error."""
        run = self.get(name)
        if run.alive():
            raise RunError(f"This {self.noun} is still working. Cancel it first.")
        trash = run.folder.with_name(f".{run.id}{TRASH_SUFFIX}")  # a killed process leaves a whole run or none
        try:
            os.replace(run.folder, trash)
        except OSError as error:
            raise RunError(f"The {self.noun} could not be deleted ({error.strerror}). Try again.") from None
        shutil.rmtree(trash, ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Remove what a process that was killed while creating or deleting a run left behind. Call at startup only."""
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.folder):
                if entry.name.startswith(".") and is_run_id(entry.name[1:].removesuffix(TRASH_SUFFIX)):
                    shutil.rmtree(entry.path, ignore_errors=True)


def is_run_id(name: object) -> bool:
    """Whether a value has the form of a run's id."""
    return isinstance(name, str) and bool(_ID.fullmatch(name))


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in a file; skips invalid lines, such as the last one of a killed process."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def format_errors(error: ValidationError) -> str:
    """Format validation errors in one line, without the invalid values, which may be long or not text."""
    messages = []
    for problem in error.errors(include_url=False, include_input=False)[:6]:
        key = ".".join(str(part) for part in problem["loc"]) or "config"
        unknown = problem["type"] == "extra_forbidden"
        message = "unknown key" if unknown else problem["msg"].removeprefix("Value error, ")
        messages.append(f"{key[:80]}: {message}")
    return "; ".join(messages)
