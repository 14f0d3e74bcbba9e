"""Answers from models on this machine: one turn at a time, streamed, stopped at the next token when nobody listens."""

from __future__ import annotations

import contextvars
import logging
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import torch

from inference.local import generation as decoding
from inference.local import model_cache as loading
from inference.local.device_queue import Cancelled, DeviceQueue
from inference.local.generation import Job
from inference.local.model_cache import LoadedModel, ModelCache, pick_device
from inference.registry import ModelSpec
from inference.types import Event, InferenceError, Queued, Request

# Small models gain nothing from a second thread, and beside a training run two threads that wait for each other at
# every operation are many times slower than one.
THREADS = 1
MAX_BATCH = 32  # requests that are computed together
logger = logging.getLogger(__name__)


class Engine:
    """One device with the queue before it and the models on it.

    A request waits, loads and computes in a thread of its own, which holds the device until the computing has really
    ended: neither a slow reader nor one that went away keeps it from the others. Single answers that wait and differ in
    photo, words and seed alone are computed together by the first of them.
    """

    def __init__(self, device: torch.device | None = None, shelf: ModelCache | None = None) -> None:
        self.device = device or pick_device()
        self.shelf = shelf or ModelCache()
        self.turns = DeviceQueue()
        self._waiting: list[Job] = []
        self._taking = threading.Lock()

    def answer(self, entry: ModelSpec, request: Request, cancel: threading.Event) -> Iterator[Event]:
        """Yields Waiting, Partial and, per candidate, one Answer, as they come. Raises InferenceError."""
        gone = threading.Event()
        events: queue.SimpleQueue[Event | Exception | None] = queue.SimpleQueue()
        job = Job(entry, request, lambda: gone.is_set() or cancel.is_set(), events.put, time.perf_counter())
        # The caller's context goes along: a hosted GPU is accounted to the visitor in it.
        run = contextvars.copy_context().run
        threading.Thread(target=run, args=(self._work, job), name=f"answer-{entry.name}", daemon=True).start()
        try:
            while (event := events.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            gone.set()

    def _work(self, job: Job) -> None:
        """Waits for the device, then computes the job and whatever else waits that goes with it."""
        self._waiting.append(job)
        try:
            with self.turns.turn(lambda: job.taken or job.stopped(), lambda position: _tell_place(job, position)):
                together = self._take(job)
                if together:
                    self._compute(together)
        except Exception as error:
            if not job.shared:
                job.emit(explain(error, job.entry))
        finally:
            with suppress(ValueError):
                self._waiting.remove(job)
            if not job.shared:
                job.emit(None)

    def _take(self, job: Job) -> list[Job]:
        """The job, and those behind it that go into one batch with it; none where another one has taken it along."""
        with self._taking:
            if job.taken:
                return []
            others = [other for other in list(self._waiting) if other is not job and not other.taken]
            together = [job, *(other for other in others if job.goes_with(other))][:MAX_BATCH]
            for one in together:
                one.taken, one.shared = True, len(together) > 1
            return together

    def _compute(self, jobs: list[Job]) -> None:
        """Several jobs end each by itself; where their batch fails, each one is computed alone, or fails alone."""
        if len(jobs) == 1:
            self._compute_batch(jobs)
            if not jobs[0].over:
                raise Cancelled
            return
        with suppress(Exception):
            self._compute_batch(jobs)
        for job in jobs:
            try:
                if not job.over and not job.stopped():
                    self._compute_batch([job])
                if not job.over:
                    raise Cancelled
            except Exception as error:
                job.emit(explain(error, job.entry))
            finally:
                job.emit(None)

    def _compute_batch(self, jobs: list[Job]) -> None:
        torch.set_num_threads(THREADS)
        loaded = self.shelf.get(jobs[0].entry, self.device)
        with ExitStack() as stack:
            self._adapt(stack, loaded, jobs[0].entry)
            if all(job.stopped() for job in jobs):
                return
            stack.enter_context(torch.inference_mode())
            decoding.answer(loaded, jobs)

    def _adapt(self, stack: ExitStack, loaded: LoadedModel, entry: ModelSpec) -> None:
        try:
            with loading.wrap_errors("bad_weights", f"The adapter of {entry.title} does not fit its model."):
                stack.enter_context(loaded.adapted(entry.adapter))
        except Exception:
            self.shelf.drop(loaded)  # half an adapter may be on it
            raise


def _tell_place(job: Job, position: int) -> None:
    if not job.taken:
        job.emit(Queued(position))


def explain(error: Exception, entry: ModelSpec) -> InferenceError:
    """Any failure as an InferenceError: its message is for a person and names no path or secret of the machine."""
    if isinstance(error, InferenceError):
        return error
    if isinstance(error, Cancelled):
        return InferenceError("cancelled", "Cancelled.")
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return InferenceError("out_of_memory", f"{entry.title} ran out of memory. Ask for fewer candidates.")
    logger.error("%s failed", entry.name, exc_info=error)
    return InferenceError("failed", f"{entry.title} failed ({type(error).__name__}). The log has the details.")


def loaded_sources() -> tuple[str, ...]:
    """The sources of the models that are in memory."""
    return _ENGINE.shelf.sources


# The machine has one device, so the process has one queue.
_ENGINE = Engine()


def answer(entry: ModelSpec, request: Request, cancel: threading.Event) -> Iterator[Event]:
    """See `Engine.answer`; all callers of this process share one queue."""
    return _ENGINE.answer(entry, request, cancel)
