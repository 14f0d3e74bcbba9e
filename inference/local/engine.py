"""Backend for local models: one device, a queue, batching of concurrent requests, streaming and cancellation."""

from __future__ import annotations

import contextvars
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress

import torch

from inference.local import generation
from inference.local.device_queue import Cancelled, DeviceQueue
from inference.local.generation import Job
from inference.local.model_cache import LoadedModel, ModelCache, pick_device, wrap_errors
from inference.types import Answer, AnswerEvent, InferenceError, ModelSpec, Queued, Request

# Small models do not benefit from a second thread. Beside a training run, two threads that synchronise at every
# operation are many times slower than one.
THREADS = 1
MAX_BATCH = 32  # jobs with one candidate each
MAX_ROWS = 16  # candidates in a batch of jobs with several each; more need much memory and save little time
logger = logging.getLogger(__name__)


class Engine:
    """One device with its queue and its cached models.

    Each request waits, loads and generates in its own thread, which holds the device until generation has ended, so
    a slow or disconnected consumer does not block others. Waiting jobs that can share a batch run with the first.

    Args:
        device: Device to run on. Default: the fastest available.
        model_cache: Cache of loaded models.
    """

    def __init__(self, device: torch.device | None = None, model_cache: ModelCache | None = None) -> None:
        self.device = device or pick_device()
        self.model_cache = model_cache or ModelCache()
        self.device_queue = DeviceQueue()
        self._waiting: list[Job] = []
        self._claim_lock = threading.Lock()

    def answer(self, spec: ModelSpec, request: Request, cancel: threading.Event) -> Iterator[AnswerEvent]:
        """Run a model on a request.

        Yields:
            Queued, TextUpdate and, per candidate, one Answer, as they come.

        Raises:
            InferenceError: If generation fails or is cancelled.
        """
        closed = threading.Event()
        events: queue.SimpleQueue[AnswerEvent | Exception | None] = queue.SimpleQueue()
        job = Job(spec, request, lambda: closed.is_set() or cancel.is_set(), events.put, time.perf_counter())
        # The thread inherits the caller's context: ZeroGPU bills the visitor found there.
        run = contextvars.copy_context().run
        threading.Thread(target=run, args=(self._run, job), name=f"answer-{spec.name}", daemon=True).start()
        try:
            while (event := events.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            closed.set()

    def answer_batch(self, spec: ModelSpec, requests: Sequence[Request], cancel: threading.Event) -> list[list[Answer]]:
        """Run a model on several requests as one batch, in the caller's thread.

        Args:
            spec: The model.
            requests: Requests that differ in photo, prompt and seed only.
            cancel: Set by the caller to cancel.

        Returns:
            The answers of each request, by candidate.

        Raises:
            InferenceError: If generation fails or is cancelled.
        """
        answers: list[list[Answer]] = [[] for _ in requests]

        def collect(index: int) -> Callable[[AnswerEvent | Exception | None], None]:
            return lambda event: answers[index].append(event) if isinstance(event, Answer) else None

        queued_at = time.perf_counter()
        jobs = [
            Job(spec, request, cancel.is_set, collect(index), queued_at, claimed=True)
            for index, request in enumerate(requests)
        ]
        try:
            with self.device_queue.acquire(cancel.is_set, lambda position: None):
                self._generate(jobs)
            if not all(job.finished for job in jobs):
                raise Cancelled
        except Exception as error:
            raise as_inference_error(error, spec) from error
        return [sorted(batch, key=lambda answer: answer.index) for batch in answers]

    def _run(self, job: Job) -> None:
        """Wait for the device, then run the job and the waiting jobs that can share its batch."""

        def send_position(position: int) -> None:
            if not job.claimed:
                job.send(Queued(position))

        self._waiting.append(job)
        try:
            with self.device_queue.acquire(lambda: job.claimed or job.is_cancelled(), send_position):
                jobs = self._claim(job)
                if len(jobs) == 1:
                    self._generate(jobs)
                    if not job.finished:
                        raise Cancelled
                elif jobs:
                    self._run_batch(jobs)
        except Exception as error:
            if not job.batched:
                job.send(as_inference_error(error, job.spec))
        finally:
            with suppress(ValueError):
                self._waiting.remove(job)
            if not job.batched:
                job.send(None)

    def _claim(self, job: Job) -> list[Job]:
        """Claim the job and the waiting jobs that can share its batch. Empty if another thread has claimed the job."""
        with self._claim_lock:
            if job.claimed:
                return []
            others = [other for other in list(self._waiting) if other is not job and not other.claimed]
            limit = MAX_BATCH if job.request.n == 1 else max(1, MAX_ROWS // job.request.n)
            jobs = [job, *(other for other in others if job.can_batch_with(other))][:limit]
            for member in jobs:
                member.claimed, member.batched = True, len(jobs) > 1
            return jobs

    def _run_batch(self, jobs: list[Job]) -> None:
        """Run several jobs as one batch; if it fails, run the unfinished ones one by one. Sends errors to each job."""
        with suppress(Exception):
            self._generate(jobs)
        for job in jobs:
            try:
                if not job.finished and not job.is_cancelled():
                    self._generate([job])
                if not job.finished:
                    raise Cancelled
            except Exception as error:
                job.send(as_inference_error(error, job.spec))
            finally:
                job.send(None)

    def _generate(self, jobs: list[Job]) -> None:
        torch.set_num_threads(THREADS)
        spec = jobs[0].spec
        start, loads = time.perf_counter(), self.model_cache.loads
        loaded = self.model_cache.get(spec, self.device)
        if self.model_cache.loads > loads:
            for job in jobs:
                job.cold_start_seconds = time.perf_counter() - start
        with ExitStack() as stack:
            self._use_adapter(stack, loaded, spec)
            if all(job.is_cancelled() for job in jobs):
                return
            stack.enter_context(torch.inference_mode())
            generation.answer(loaded, jobs)

    def _use_adapter(self, stack: ExitStack, loaded: LoadedModel, spec: ModelSpec) -> None:
        try:
            with wrap_errors("bad_weights", f"The adapter of {spec.title} does not fit its model."):
                stack.enter_context(loaded.use_adapter(spec.adapter))
        except Exception:
            self.model_cache.drop(loaded)  # the adapter may be partially loaded
            raise


def as_inference_error(error: Exception, spec: ModelSpec) -> InferenceError:
    """Convert any exception to an InferenceError whose message contains no paths or secrets."""
    if isinstance(error, InferenceError):
        return error
    if isinstance(error, Cancelled):
        return InferenceError("cancelled", "Cancelled.")
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return InferenceError("out_of_memory", f"{spec.title} ran out of memory. Request fewer candidates.")
    logger.error("%s failed", spec.name, exc_info=error)
    return InferenceError("failed", f"{spec.title} failed ({type(error).__name__}). See the log for details.")


_ENGINE = Engine()  # one device and one queue per process


def loaded_sources() -> tuple[str, ...]:
    """Return the sources of the models in memory."""
    return _ENGINE.model_cache.sources


def answer(spec: ModelSpec, request: Request, cancel: threading.Event) -> Iterator[AnswerEvent]:
    """Run a model on the engine of this process. See `Engine.answer`."""
    return _ENGINE.answer(spec, request, cancel)


def answer_batch(spec: ModelSpec, requests: Sequence[Request], cancel: threading.Event) -> list[list[Answer]]:
    """Run a model on several requests as one batch on the engine of this process. See `Engine.answer_batch`."""
    return _ENGINE.answer_batch(spec, requests, cancel)
