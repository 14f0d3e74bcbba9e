"""Answers from models on this machine: one turn at a time, streamed, stopped at the next token when nobody listens."""

from __future__ import annotations

import contextvars
import logging
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import torch

from inference import decoding, loading
from inference.answers import Event, InferenceError, Request, Waiting
from inference.decoding import Job
from inference.loading import Loaded, Shelf, pick_device
from inference.models import ModelEntry
from inference.turns import Stopped, Turns

# Small models gain nothing from a second thread, and beside a training run two threads that wait for each other at
# every operation are many times slower than one.
THREADS = 1
logger = logging.getLogger(__name__)


class Engine:
    """One device with the queue before it and the models on it.

    A request waits, loads and computes in a thread of its own, which holds the device until the computing has really
    ended: neither a slow reader nor one that went away keeps it from the others.
    """

    def __init__(self, device: torch.device | None = None, shelf: Shelf | None = None) -> None:
        self.device = device or pick_device()
        self.shelf = shelf or Shelf()
        self.turns = Turns()

    def answer(self, entry: ModelEntry, request: Request, cancel: threading.Event) -> Iterator[Event]:
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
        try:
            with self.turns.turn(job.stopped, lambda position: job.emit(Waiting(position))):
                self._compute(job)
        except Exception as error:
            job.emit(explain(error, job.entry))
        finally:
            job.emit(None)

    def _compute(self, job: Job) -> None:
        torch.set_num_threads(THREADS)
        loaded = self.shelf.get(job.entry, self.device)
        with ExitStack() as stack:
            self._adapt(stack, loaded, job.entry)
            if job.stopped():
                raise Stopped
            stack.enter_context(torch.inference_mode())
            decoding.answer(loaded, job)

    def _adapt(self, stack: ExitStack, loaded: Loaded, entry: ModelEntry) -> None:
        try:
            with loading.explained("bad_weights", f"The adapter of {entry.title} does not fit its model."):
                stack.enter_context(loaded.adapted(entry.adapter))
        except Exception:
            self.shelf.drop(loaded)  # half an adapter may be on it
            raise


def explain(error: Exception, entry: ModelEntry) -> InferenceError:
    """Any failure as an InferenceError: its message is for a person and names no path or secret of the machine."""
    if isinstance(error, InferenceError):
        return error
    if isinstance(error, Stopped):
        return InferenceError("cancelled", "Cancelled.")
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return InferenceError("out_of_memory", f"{entry.title} ran out of memory. Ask for fewer candidates.")
    logger.error("%s failed", entry.name, exc_info=error)
    return InferenceError("failed", f"{entry.title} failed ({type(error).__name__}). The log has the details.")


# The machine has one device, so the process has one queue.
_ENGINE = Engine()


def answer(entry: ModelEntry, request: Request, cancel: threading.Event) -> Iterator[Event]:
    """See `Engine.answer`; all callers of this process share one queue."""
    return _ENGINE.answer(entry, request, cancel)
