"""Queue that executes training runs one after another, each in its own process or inline in the caller's.

A training process outlives the application that started it: after a restart the queue finds the process by the run's
lock and waits for it. The worker thread exists only while there are unfinished runs. A file lock on the store lets
several queues share one folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from training.data.sources import HUB_PREFIX
from training.data.uploads import delete_unused
from training.runs.run import GUEST_PREFIX, Run, RunConfig, RunError, RunStore

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "training.grpo")
MAX_OWN_RUNS = 15  # stored runs of one visitor
MAX_QUEUED = 20  # runs that wait or train, of all owners together
DUPLICATE_SECONDS = 2.0  # an identical config submitted again within this time is a double click
NICENESS = 19  # lowest CPU priority, so that inference stays responsive
TOKEN_VARIABLES = {"here": "HF_TOKEN", "jobs": "HF_TOKEN", "hosted": "MOONDREAM_API_KEY"}
TOKEN_NAMES = {"here": "Hugging Face token", "jobs": "Hugging Face token", "hosted": "Moondream API key"}
HUB_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # from which huggingface_hub reads a token
_log = logging.getLogger(__name__)


class RunQueue:
    """Executes the runs of a store in order of submission.

    Args:
        runs: The store.
        command: Command of the training process; the run's folder is appended.
        on_end: Called with each run that has ended, in the worker's thread.
        poll_seconds: Interval between checks of the running process.
        inline: Function that executes a run, given its folder, in the calling request. If set, runs on the backend
            "here" are executed by `run_inline` instead of by a process.
        release: Called with the id of a run before it is deleted to make room, to remove its model from the registry;
            returns False if the run must stay. If set, a full store makes room for a new run by deleting the oldest
            finished runs of guests. Runs of other owners are never deleted automatically.
        environment: Environment variables for the training processes, such as `BillingAccount.to_env`.
    """

    def __init__(
        self,
        runs: RunStore,
        command: Sequence[str] = COMMAND,
        on_end: Callable[[Run], object] | None = None,
        poll_seconds: float = 0.3,
        inline: Callable[[str], object] | None = None,
        release: Callable[[str], bool] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.runs = runs
        self.command = tuple(command)
        self.on_end = on_end
        self.poll_seconds = poll_seconds
        self.inline = inline
        self.release = release
        self.environment = dict(environment or {})
        self._lock = threading.Lock()
        self._submit_lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._tokens: dict[str, str] = {}  # by run id; kept in memory only, until the run ends

    # ── Callers' threads ────────────────────────────────────────────────────────────────────────────────────────────

    def submit(
        self,
        config: RunConfig,
        token: str = "",
        owner: str = "",
        owner_name: str = "",
        max_unfinished: int | None = None,
    ) -> Run:
        """Queue a run.

        Args:
            config: Settings of the run.
            token: Hugging Face token or Moondream API key, passed to this run's process only and never stored. A run
                that was submitted with one never uses the deployment's instead. Ignored if the run needs none.
            owner: Identifies the visitor, as `access.roles.Visitor.id`.
            owner_name: Display name of the visitor.
            max_unfinished: Maximum number of unfinished runs of this owner; None for no limit.

        Raises:
            RunError: If the queue is full, the owner has too many runs, the same config was submitted a
                moment ago, or the run cannot be stored.
        """
        token = token if _uses_token(config) else ""
        with self._submit_lock:
            unfinished = self.unfinished()
            if any(_is_duplicate(run, config, owner) for run in unfinished):
                raise RunError("This run was queued a moment ago. It is in the list.")
            _check_limits(unfinished, owner, max_unfinished)
            if owner and sum(run.owner == owner for run in self.runs.list()) >= MAX_OWN_RUNS:
                raise RunError(f"You have {MAX_OWN_RUNS} runs, which is the limit. Delete one first.")
            self._make_room(config, unfinished)
            run_id = self.runs.new_id()
            self._tokens[run_id] = token  # before the run exists: the worker may start it at once
            try:
                run = self.runs.create(config, owner, owner_name, own_key=bool(token), run_id=run_id)
            except RunError:
                del self._tokens[run_id]
                raise
        self.wake()
        return run

    def _make_room(self, config: RunConfig, unfinished: Sequence[Run]) -> None:
        """Delete the oldest finished runs of guests until the store takes another run, as far as `release` allows.

        Runs that the new run or an unfinished one starts from are kept.
        """
        if self.release is None or not self.runs.is_full:
            return
        kept = {_base_id(config)}
        for run in unfinished:
            with contextlib.suppress(RunError):
                kept.add(_base_id(run.config()))
        for run in self.runs.list():
            if not self.runs.is_full:
                return
            candidate = run.id not in kept and run.owner.startswith(GUEST_PREFIX) and run.status().finished
            if candidate and self.release(run.id):
                with contextlib.suppress(RunError):  # the run was deleted meanwhile, or is still stopping
                    photos = run.config().photos
                    self.runs.delete(run.id)
                    delete_unused(self.runs, photos)

    def unfinished(self) -> list[Run]:
        """List the runs that have not ended in execution order: running ones first, then queued ones."""
        pairs = [(run, run.status()) for run in self.runs.list()]
        pairs = [(run, status) for run, status in pairs if not status.finished]
        pairs.sort(key=lambda pair: (pair[1].state == "queued", pair[1].created))
        return [run for run, _ in pairs]

    def position(self, run: Run) -> int:
        """Return the number of runs ahead of this one; 0 if it is running or next."""
        ids = [other.id for other in self.unfinished()]
        return ids.index(run.id) if run.id in ids else 0

    def resume(self, run: Run, token: str = "", max_unfinished: int | None = None) -> None:
        """Queue a stopped run again, to continue from its last checkpoint.

        Args:
            run: An interrupted, cancelled or failed run.
            token: See `submit`. Required if the run was started with one.
            max_unfinished: Maximum number of unfinished runs of the run's owner; None for no limit.

        Raises:
            RunError: If the run was not stopped, its process is still alive, its key is missing, a limit is reached, or
                its folder cannot be written.
        """
        token = token if _uses_token(run.config()) else ""
        with self._submit_lock:
            state, ownership = run.status().state, run.ownership
            if state not in ("interrupted", "cancelled", "failed"):
                raise RunError(f"Only a stopped run can be resumed; this one is {state}.")
            if run.alive():
                raise RunError("This run is still stopping. Try again in a moment.")
            if ownership.own_key and not token:
                raise RunError(_missing_key(run))
            _check_limits(self.unfinished(), ownership.owner, max_unfinished)
            try:
                (run.folder / "cancel").unlink(missing_ok=True)
                if token and not ownership.own_key:
                    run.set_ownership(replace(ownership, own_key=True))
                self._tokens[run.id] = token  # before the state changes: the worker may start the run at once
                run.set_status(state="queued", phase="", ended=0.0, message="")
            except OSError as error:
                self._tokens.pop(run.id, None)
                raise RunError(f"Could not write the run's folder ({error.strerror}). Free some disk space.") from None
        self.wake()

    def run_inline(self, run: Run) -> None:
        """Execute a queued run in this call, one at a time; returns at once for runs with a process of their own.

        Raises whatever `inline` raises; the run can then be resumed.
        """
        if self.inline is None or not self._is_inline(run):
            return
        with FileLock(self.runs.folder / ".inside"):
            if run.status().state == "queued":
                try:
                    self.inline(str(run.folder))
                finally:
                    self._finalize(run, None)

    def mark_orphans(self) -> None:
        """Clean up after an earlier process, at startup.

        Inline runs whose request ended with that process become interrupted, so that they can be resumed. Remains of
        runs that were being created or deleted are removed.
        """
        self.runs.remove_leftovers()
        for run in self.unfinished():
            if self._is_inline(run) and not run.alive():
                run.mark_ended("interrupted", "The application restarted before the run started. Resume it.")

    def wake(self) -> None:
        """Start the worker thread if runs need it. Call after every change."""
        with self._lock:
            if self._thread is None and not self._stop.is_set() and self._subprocess_runs():
                self._thread = threading.Thread(target=self._work, name="training", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """Stop the worker thread. A running training process continues; the next queue waits for it."""
        self._stop.set()
        with self._lock:
            thread = self._thread
        if thread:
            thread.join(10)

    def _is_inline(self, run: Run) -> bool:
        return self.inline is not None and run.config().backend == "here"

    def _subprocess_runs(self) -> list[Run]:
        return [run for run in self.unfinished() if not self._is_inline(run)]

    # ── Worker thread ───────────────────────────────────────────────────────────────────────────────────────────────

    def _work(self) -> None:
        """Execute runs until none is left, while no other queue works on the store."""
        lock = FileLock(self.runs.folder / ".worker")
        while not self._stop.is_set():
            try:
                with lock.acquire(timeout=self.poll_seconds):
                    while not self._stop.is_set() and (runs := self._subprocess_runs()):
                        self._execute(runs[0])
            except Timeout:
                pass  # another application works on this folder
            except Exception:
                _log.exception("The training queue failed; trying again")
                self._stop.wait(5)
            with self._lock:
                if self._stop.is_set() or not self._subprocess_runs():
                    self._thread = None
                    return

    def _execute(self, run: Run) -> None:
        """Wait for a run's process, started here or by an earlier application, and store how the run ended."""
        process = None if run.alive() else self._start_process(run)
        while not self._stop.wait(self.poll_seconds):
            if not (process is not None and process.poll() is None) and not run.alive():
                break
        if not self._stop.is_set():
            self._finalize(run, process)
            if not run.status().finished:  # the status could not be written, for example on a full disk
                self._stop.wait(10 * self.poll_seconds)

    def _start_process(self, run: Run) -> subprocess.Popen[bytes] | None:
        token = self._tokens.get(run.id, "")
        if not token and (run.own_key or run.config().backend == "jobs"):
            run.mark_ended("failed", _missing_key(run))  # the deployment's key must not pay for a visitor's run
            return None
        try:
            with open(run.folder / "log.txt", "ab") as log:
                process = subprocess.Popen(
                    [*self.command, str(run.folder)],
                    cwd=ROOT,
                    env=_environment(run, token) | self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            run.mark_ended("failed", f"The training process could not be started ({error.strerror}).")
            return None
        with contextlib.suppress(OSError, AttributeError):  # not available on every system
            os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
        return process

    def _finalize(self, run: Run, process: subprocess.Popen[bytes] | None) -> None:
        """Store the final state of a run whose process has ended, and call `on_end`."""
        code = process.returncode if process else None
        state, ended = run.status().state, run.status().ended
        if state == "queued" and self._is_inline(run):
            run.mark_ended("interrupted", "The run could not start here. Resume it later.")
        elif state == "queued" and process:
            run.mark_ended(
                "failed", f"The training process ended before the run started (exit code {code}). See the log."
            )
        elif state == "interrupted" and not ended and code is not None and code > 0:
            run.mark_ended("failed", f"The training process ended with an error (exit code {code}). See the log.")
        elif state == "interrupted" and not ended:  # else the process has stored the reason
            run.mark_ended("interrupted", "The training process was killed. Resume the run, or see the log.")
        with self._submit_lock:  # a run that is resumed at this moment keeps its new token
            if run.status().finished:
                self._tokens.pop(run.id, None)
        if self.on_end:
            try:
                self.on_end(run)
            except Exception:
                _log.exception("The callback after a run failed")


def _base_id(config: RunConfig) -> str:
    """Return the id of the run that a config's base names; meaningless if the base is not a run."""
    return Path(config.base).name.removeprefix("run-")


def _uses_token(config: RunConfig) -> bool:
    """Whether a run needs a credential: for its backend, or for photos from the Hub."""
    return config.backend != "here" or config.photos.startswith(HUB_PREFIX) or config.held_out.startswith(HUB_PREFIX)


def _missing_key(run: Run) -> str:
    name = TOKEN_NAMES[run.config().backend]
    return f"This run uses your own {name}, which is not stored. Enter it again and resume the run."


def _environment(run: Run, token: str) -> dict[str, str]:
    """Build the environment of a run's process.

    The submitted token replaces the deployment's. Runs of visitors do not get the deployment's Hugging Face token:
    they could read the deployment's private datasets with it.
    """
    env, variable = dict(os.environ), TOKEN_VARIABLES[run.config().backend]
    if run.owner:
        for name in HUB_TOKEN_VARIABLES:
            env.pop(name, None)
        if not (token and variable in HUB_TOKEN_VARIABLES):
            env["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"  # nor one from `hf auth login`
    return env | {variable: token} if token else env


def _check_limits(unfinished: Sequence[Run], owner: str, max_unfinished: int | None) -> None:
    """Check the length of the queue, and the number of the owner's runs in it. Raises RunError."""
    own = sum(run.owner == owner for run in unfinished) if max_unfinished is not None else 0
    if max_unfinished is not None and own >= max_unfinished:
        count = "a run" if own == 1 else f"{own} runs"
        raise RunError(f"You have {count} waiting already, which is the limit. Cancel one, or wait until it has ended.")
    if len(unfinished) >= MAX_QUEUED:
        raise RunError(f"The queue is full: {len(unfinished)} runs are waiting or training. Try again later.")


def _is_duplicate(run: Run, config: RunConfig, owner: str) -> bool:
    with contextlib.suppress(RunError):
        return run.config() == config and run.owner == owner and time.time() - run.status().created < DUPLICATE_SECONDS
    return False
