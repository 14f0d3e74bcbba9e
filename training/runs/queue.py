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
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from training.runs.run import Run, RunConfig, RunError, RunStore

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "training.grpo")
MAX_QUEUED = 8
DUPLICATE_SECONDS = 2.0  # an identical config submitted again within this time is a double click
NICENESS = 19  # lowest CPU priority, so that inference stays responsive
TOKEN_VARIABLES = {"here": "HF_TOKEN", "jobs": "HF_TOKEN", "hosted": "MOONDREAM_API_KEY"}
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
    """

    def __init__(
        self,
        runs: RunStore,
        command: Sequence[str] = COMMAND,
        on_end: Callable[[Run], object] | None = None,
        poll_seconds: float = 0.3,
        inline: Callable[[str], object] | None = None,
    ) -> None:
        self.runs = runs
        self.command = tuple(command)
        self.on_end = on_end
        self.poll_seconds = poll_seconds
        self.inline = inline
        self._lock = threading.Lock()
        self._submit_lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._tokens: dict[str, str] = {}  # by run id; kept in memory only

    # ── Callers' threads ────────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, config: RunConfig, token: str = "") -> Run:
        """Queue a run.

        Args:
            config: Settings of the run.
            token: Hugging Face token or Moondream API key, passed to this run's process only and never stored.

        Raises:
            RunError: If the queue is full, or the same config was submitted a moment ago.
        """
        with self._submit_lock:
            unfinished = self.unfinished()
            if len([run for run in unfinished if run.status().state == "queued"]) >= MAX_QUEUED:
                raise RunError(f"The queue is full ({MAX_QUEUED} runs). Try again when one of them has started.")
            if any(_is_duplicate(run, config) for run in unfinished):
                raise RunError("This run was queued a moment ago. It is in the list.")
            run = self.runs.create(config)
            self._tokens[run.id] = token
        self.wake()
        return run

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

    def resume(self, run: Run, token: str = "") -> None:
        """Queue a stopped run again, to continue from its last checkpoint.

        Args:
            run: An interrupted, cancelled or failed run.
            token: See `submit`.

        Raises:
            RunError: If the run was not stopped, its process is still alive, or its folder cannot be written.
        """
        state = run.status().state
        if state not in ("interrupted", "cancelled", "failed"):
            raise RunError(f"Only a stopped run can be resumed; this one is {state}.")
        if run.alive():
            raise RunError("This run is still stopping. Try again in a moment.")
        try:
            (run.folder / "cancel").unlink(missing_ok=True)
            run.set_status(state="queued", phase="", ended=0.0, message="")
            self._tokens[run.id] = token
        except OSError as error:
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
        """Mark inline runs whose request ended with an earlier process as interrupted, so that they can be resumed."""
        for run in self.unfinished():
            if self._is_inline(run) and not run.alive():
                _mark_ended(run, "interrupted", "The application restarted before the run started. Resume it.")

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
        token = self._tokens.pop(run.id, "")
        backend = run.config().backend
        if not token and backend == "jobs":  # the deployment's own token must not pay for a visitor's job
            _mark_ended(run, "failed", "The run's Hugging Face token is no longer known. Resume it with a token.")
            return None
        try:
            with open(run.folder / "log.txt", "ab") as log:
                process = subprocess.Popen(
                    [*self.command, str(run.folder)],
                    cwd=ROOT,
                    env={**os.environ, TOKEN_VARIABLES[backend]: token} if token else None,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            _mark_ended(run, "failed", f"The training process could not be started ({error.strerror}).")
            return None
        with contextlib.suppress(OSError, AttributeError):  # not available on every system
            os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
        return process

    def _finalize(self, run: Run, process: subprocess.Popen[bytes] | None) -> None:
        """Store the final state of a run whose process has ended, and call `on_end`."""
        code = process.returncode if process else None
        state = run.status().state
        if state == "queued" and self._is_inline(run):
            _mark_ended(run, "interrupted", "The run could not start here. Resume it later.")
        elif state == "queued" and process:
            _mark_ended(
                run, "failed", f"The training process ended before the run started (exit code {code}). See the log."
            )
        elif state == "interrupted" and code is not None and code > 0:
            _mark_ended(run, "failed", f"The training process ended with an error (exit code {code}). See the log.")
        elif state == "interrupted":
            _mark_ended(run, "interrupted", "The training process was killed. Resume the run, or see the log.")
        if self.on_end:
            try:
                self.on_end(run)
            except Exception:
                _log.exception("The callback after a run failed")


def _mark_ended(run: Run, state: str, message: str) -> None:
    with contextlib.suppress(OSError):  # the run was deleted or the disk is full: the next check repeats this
        run.set_status(state=state, ended=time.time(), message=message)


def _is_duplicate(run: Run, config: RunConfig) -> bool:
    with contextlib.suppress(RunError):
        return run.config() == config and time.time() - run.status().created < DUPLICATE_SECONDS
    return False
