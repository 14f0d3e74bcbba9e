"""Queue that does evaluations one after another in a thread of the application, which shares its loaded models."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from training.evaluations.evaluation import Evaluation, EvaluationConfig, EvaluationStore
from training.evaluations.runner import ModelAccess, run_evaluation
from training.runs.run import RunError

MAX_OWN = 15  # stored evaluations of one visitor
MAX_WAITING = 20  # of all visitors together
STOP_SECONDS = 5.0  # Spaces are killed soon after SIGTERM
RESTARTED = "The application restarted. Resume it."
NEEDS_KEY = "This evaluation uses your own Moondream API key, which is not stored. Enter it again and resume."
_log = logging.getLogger(__name__)


class EvaluationQueue:
    """Does the evaluations of a store in order of submission.

    Args:
        store: The store.
        on_photos: Called with the photo source of an evaluation once its photos are copied.
    """

    def __init__(self, store: EvaluationStore, on_photos: Callable[[str], object] | None = None) -> None:
        self.store = store
        self.on_photos = on_photos or (lambda source: None)
        self._lock = threading.Lock()
        self._waiting: dict[str, ModelAccess] = {}  # by id, in order; kept in memory only, because of the keys
        self._running: tuple[str, threading.Event] | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False

    def submit(
        self,
        config: EvaluationConfig,
        access: ModelAccess,
        owner: str = "",
        owner_name: str = "",
        own_key: bool = False,
        max_unfinished: int | None = None,
    ) -> Evaluation:
        """Queue an evaluation.

        Args:
            config: The settings.
            access: How its models are called.
            owner: Identifies the visitor, as `access.roles.Visitor.id`.
            owner_name: Display name of the visitor.
            own_key: Whether a key that the visitor entered pays, so that the deployment's must not.
            max_unfinished: Maximum number of unfinished evaluations of this owner; None for no limit.

        Raises:
            RunError: A limit is reached, or the folder cannot be written.
        """
        with self._lock:
            self._check_limits(owner, max_unfinished)
            if owner and sum(item.owner == owner for item in self.store.list()) >= MAX_OWN:
                raise RunError(f"You have {MAX_OWN} evaluations, which is the limit. Delete one first.")
            evaluation = self.store.create(config, owner, owner_name, own_key)
            self._start(evaluation, access)
        return evaluation

    def resume(self, evaluation: Evaluation, access: ModelAccess, max_unfinished: int | None = None) -> None:
        """Queue a stopped evaluation again; what was answered is kept. Raises RunError."""
        with self._lock:
            if not evaluation.status().finished or evaluation.status().state == "done":
                raise RunError("Only a stopped evaluation can be resumed.")
            if evaluation.own_key and access.payer != "visitor":
                raise RunError(NEEDS_KEY)
            self._check_limits(evaluation.owner, max_unfinished)
            try:
                (evaluation.folder / "cancel").unlink(missing_ok=True)
                evaluation.set_status(state="queued", phase="", ended=0.0, message="")
            except OSError as error:
                raise RunError(f"The evaluation's folder cannot be written ({error.strerror}).") from None
            self._start(evaluation, access)

    def cancel(self, evaluation: Evaluation) -> None:
        """Stop an evaluation as soon as possible; what was answered is kept. Raises RunError or OSError."""
        if evaluation.status().finished:
            raise RunError("This evaluation has already ended.")
        with self._lock:
            self._waiting.pop(evaluation.id, None)
            evaluation.cancel()
            if self._running and self._running[0] == evaluation.id:
                self._running[1].set()

    def position(self, evaluation: Evaluation) -> int:
        """Return the number of evaluations ahead of a queued one."""
        with self._lock:
            ids = [*([self._running[0]] if self._running else []), *self._waiting]
        return ids.index(evaluation.id) if evaluation.id in ids else 0

    def mark_orphans(self) -> None:
        """Mark evaluations that an earlier process left in the queue as interrupted. Call at startup."""
        self.store.remove_leftovers()
        for evaluation in self.store.list():
            if evaluation.status().state == "queued":
                evaluation.mark_ended("interrupted", RESTARTED)

    def stop(self) -> None:
        """Interrupt the evaluation that is worked on and keep those that wait. Call before the process ends.

        They can be resumed after a restart; see `mark_orphans`.
        """
        with self._lock:
            self._stopping = True
            self._waiting.clear()
            if self._running:
                self._running[1].set()
        self.join(STOP_SECONDS)

    def join(self, timeout: float | None = None) -> None:
        """Wait until the queue is empty."""
        thread = self._thread
        if thread:
            thread.join(timeout)

    def _check_limits(self, owner: str, max_unfinished: int | None) -> None:
        unfinished = [item for item in self.store.list() if not item.status().finished]
        if max_unfinished is not None and sum(item.owner == owner for item in unfinished) >= max_unfinished:
            raise RunError("You have an evaluation that has not ended. Wait for it, or cancel it.")
        if len(unfinished) >= MAX_WAITING:
            raise RunError(f"The queue is full: {MAX_WAITING} evaluations are waiting. Try again later.")

    def _start(self, evaluation: Evaluation, access: ModelAccess) -> None:
        """Add to the waiting ones and start the thread if there is none. Requires the lock."""
        self._waiting[evaluation.id] = access
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="evaluations", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                name = next(iter(self._waiting), None)
                if name is None:
                    self._thread = self._running = None
                    return
                access, cancel = self._waiting.pop(name), threading.Event()
                self._running = name, cancel
            evaluation = Evaluation(self.store.folder / name)
            try:
                run_evaluation(evaluation, access, cancel, cache_folder=self.cache_folder)
                if evaluation.photos() is not None:
                    self.on_photos(evaluation.config().photos)
            except Exception as error:
                _log.exception("The evaluation %s failed", name)
                message = str(error) if isinstance(error, RunError) else f"It failed ({type(error).__name__})."
                evaluation.mark_ended("failed", f"{message} Resume it.")
            if self._stopping and evaluation.status().state != "done":
                evaluation.mark_ended("interrupted", RESTARTED)

    @property
    def cache_folder(self) -> Path:
        """Folder of the scores of random recipes, which evaluations of the same photos share."""
        return self.store.folder / ".references"
