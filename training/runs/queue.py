"""The worker: starts queued runs one after another, each in a process of its own, and follows those that live already.

A run outlives the application that started it. The worker's thread lives only while there are runs to do; two workers
on one folder take turns through a lock on it.
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

from training.runs.run import Run, RunConfig, RunError, Runs

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "training.grpo")
MAX_QUEUED = 8
TWICE = 2.0  # seconds in which the same wish again is a double click
NICE = 19  # a training run leaves the processor to the people who wait for an answer
TOKENS = {"here": "HF_TOKEN", "jobs": "HF_TOKEN", "hosted": "MOONDREAM_API_KEY"}  # the variable that hands one on
_log = logging.getLogger(__name__)


class RunQueue:
    """Does the runs of a folder in their order. `on_end` is called, in the worker's thread, with each run that ends."""

    def __init__(
        self,
        runs: Runs,
        command: Sequence[str] = COMMAND,
        on_end: Callable[[Run], object] | None = None,
        every: float = 0.3,
        inside: Callable[[str], object] | None = None,
    ) -> None:
        """inside: does a run, given its folder, in the request that asked for it; see `do_inside`."""
        self.runs = runs
        self.inside = inside
        self.command = tuple(command)
        self.on_end = on_end
        self.every = every
        self._lock = threading.Lock()
        self._submitting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._tokens: dict[str, str] = {}  # by run; they are kept nowhere else

    # ── What others ask for ─────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, config: RunConfig, token: str = "") -> Run:
        """Queues a run. Raises RunError when too many wait, or when the same was asked for a moment ago.

        token: of the Hub, or Moondream's key, for the process that does this run alone; it is not written anywhere.
        """
        with self._submitting:
            waiting = self.waiting()
            if len([run for run in waiting if run.status().state == "queued"]) >= MAX_QUEUED:
                raise RunError(f"{MAX_QUEUED} runs are waiting already. Try again when one of them has begun.")
            if any(_is_twice(run, config) for run in waiting):
                raise RunError("This run was queued a moment ago. It is in the list.")
            run = self.runs.create(config)
            self._tokens[run.id] = token
        self.wake()
        return run

    def waiting(self) -> list[Run]:
        """The runs that are not over, in the order in which they are done: those that work, then the queued ones."""
        found = [(run, run.status()) for run in self.runs.list()]
        found = [(run, status) for run, status in found if not status.over]
        found.sort(key=lambda one: (one[1].state == "queued", one[1].created))
        return [run for run, _ in found]

    def position(self, run: Run) -> int:
        """How many runs are done before this one: 0 for the one that works or comes next."""
        ids = [other.id for other in self.waiting()]
        return ids.index(run.id) if run.id in ids else 0

    def resume(self, run: Run, token: str = "") -> None:
        """Queues a run again that stopped before it was done; it goes on from its last checkpoint. Raises RunError."""
        state = run.status().state
        if state not in ("interrupted", "cancelled", "failed"):
            raise RunError(f"Only a run that was stopped can be resumed; this one is {state}.")
        if run.alive():
            raise RunError("This run is still ending. Try again in a moment.")
        try:
            (run.folder / "cancel").unlink(missing_ok=True)
            run.set_status(state="queued", phase="", ended=0.0, message="")
            self._tokens[run.id] = token
        except OSError as error:
            raise RunError(f"The run's folder could not be written ({error.strerror}).") from None
        self.wake()

    def do_inside(self, run: Run) -> None:
        """Does a queued run in this very call, one at a time, where runs are done so. Elsewhere it returns at once.

        Raises what `inside` raises; the run can then be resumed.
        """
        if self.inside is None or not self._is_inside(run):
            return
        with FileLock(self.runs.folder / ".inside"):
            if run.status().state == "queued":
                try:
                    self.inside(str(run.folder))
                finally:
                    self._settle(run, None)

    def abandon(self) -> None:
        """Runs that wait for a request that has gone with an earlier process can be resumed, and are said so."""
        for run in self.waiting():
            if self._is_inside(run) and not run.alive():
                _end(run, "interrupted", "The application was restarted before its turn. Resume it.")

    def _is_inside(self, run: Run) -> bool:
        return self.inside is not None and run.config().where == "here"

    def _behind(self) -> list[Run]:
        """Of the runs that are not over those that are done in processes of their own."""
        return [run for run in self.waiting() if not self._is_inside(run)]

    def wake(self) -> None:
        """Sees to it that somebody does what is queued and follows what works. Called after every change."""
        with self._lock:
            if self._thread is None and not self._stop.is_set() and self._behind():
                self._thread = threading.Thread(target=self._work, name="training", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """Ends the worker's thread. A run that works goes on, and the next worker finds it."""
        self._stop.set()
        with self._lock:
            thread = self._thread
        if thread:
            thread.join(10)

    # ── The worker's thread ─────────────────────────────────────────────────────────────────────────────────────────

    def _work(self) -> None:
        mine = FileLock(self.runs.folder / ".worker")
        while not self._stop.is_set():
            try:
                with mine.acquire(timeout=self.every):
                    self._work_through()
            except Timeout:
                pass  # another application works on this folder
            except Exception:
                _log.exception("The training worker stumbled")
                self._stop.wait(5)
            with self._lock:
                if self._stop.is_set() or not self._behind():
                    self._thread = None
                    return

    def _work_through(self) -> None:
        while not self._stop.is_set() and (waiting := self._behind()):
            run = waiting[0]
            child = None if run.alive() else self._start(run)
            while not self._stop.wait(self.every) and _works(run, child):
                pass
            if not self._stop.is_set():
                self._settle(run, child)
                if not run.status().over:
                    self._stop.wait(10 * self.every)  # it could not be written down: a full disk, perhaps

    def _start(self, run: Run) -> subprocess.Popen[bytes] | None:
        token = self._tokens.pop(run.id, "")
        where = run.config().where
        if not token and where == "jobs":  # that of this machine is not for everybody who sees the page
            _end(run, "failed", "Its Hugging Face token is not known any more. Resume it with a token.")
            return None
        try:
            with open(run.folder / "log.txt", "ab") as log:
                child = subprocess.Popen(
                    [*self.command, str(run.folder)],
                    cwd=ROOT,
                    env={**os.environ, TOKENS[where]: token} if token else None,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            _end(run, "failed", f"The training process could not be started ({error.strerror}).")
            return None
        with contextlib.suppress(OSError, AttributeError):  # not every system has it
            os.setpriority(os.PRIO_PROCESS, child.pid, NICE)
        return child

    def _settle(self, run: Run, child: subprocess.Popen[bytes] | None) -> None:
        """Gives a run whose process has gone its last state, and tells who wants to know."""
        code = child.returncode if child else None
        state = run.status().state
        if state == "queued" and self._is_inside(run):
            _end(run, "interrupted", "It could not begin here. Resume it later.")
        elif state == "queued" and child:
            _end(run, "failed", f"The training process ended before it began (exit code {code}). Its log says why.")
        elif state == "interrupted" and code is not None and code > 0:
            _end(run, "failed", f"The training process ended with an error (exit code {code}). Its log says why.")
        elif state == "interrupted":
            _end(run, "interrupted", "Its process was ended before it was done. Resume it, or see its log.")
        if self.on_end:
            try:
                self.on_end(run)
            except Exception:
                _log.exception("What follows a run failed")


def _works(run: Run, child: subprocess.Popen[bytes] | None) -> bool:
    """Whether a process works on it: ours, or one that an earlier application has started."""
    return (child is not None and child.poll() is None) or run.alive()


def _end(run: Run, state: str, message: str) -> None:
    with contextlib.suppress(OSError):  # it may have been deleted, or the disk is full: the next look says the same
        run.set_status(state=state, ended=time.time(), message=message)


def _is_twice(run: Run, config: RunConfig) -> bool:
    with contextlib.suppress(RunError):
        return run.config() == config and time.time() - run.status().created < TWICE
    return False
